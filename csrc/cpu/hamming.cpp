// pack_bits, hamming_distance and hamming_topk for CPU tensors. The kernels stand in hamming.h.
#include "hamming.h"

#include "../stable.h"

namespace ragsr {
namespace {

const CpuKernel& kernel() {
  static const CpuKernel chosen = choose_kernel();
  return chosen;
}

// Bit j of byte i is x[8i + j] > 0.
template <class T>
void pack_row(const T* x, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i += 8) {
    int byte = 0;
    for (int64_t j = 0; j < std::min<int64_t>(8, n - i); ++j) byte |= (x[i + j] > static_cast<T>(0)) << j;
    out[i / 8] = static_cast<uint8_t>(byte);
  }
}

Tensor pack_bits(const Tensor& any) {
  const Tensor x = torch::stable::contiguous(any);
  const int64_t n = x.size(x.dim() - 1);
  const int64_t width = (n + 7) / 8;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = width;
  Tensor out = torch::stable::new_empty(x, shape, Scalar::Byte);
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const bool known = with_type(x.scalar_type(), [&](auto type) {
    const auto from = static_cast<decltype(type)>(x.const_data_ptr());
    torch::stable::parallel_for(0, x.numel() / n, 1 + 4096 / n, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) pack_row(from + row * n, n, to + row * width);
    });
  });
  return known ? out : pack_bits(torch::stable::to(x, Scalar::Float));  // float8 and the like
}

Tensor hamming_distance(const Tensor& queries, const Tensor& codes) {
  const Tensor a = packed_codes(queries), b = packed_codes(codes);
  const int64_t q = a.size(0), n = b.size(0), width = b.size(1);
  STD_TORCH_CHECK(a.size(1) == width, "queries and codes must have one width");
  Tensor out = empty_on(queries, {q, n}, Scalar::Int);
  const uint8_t* from = a.const_data_ptr<uint8_t>();
  const uint8_t* to = b.const_data_ptr<uint8_t>();
  int32_t* result = out.mutable_data_ptr<int32_t>();
  constexpr int64_t kBlock = 4096;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, q * blocks, 1, [&](int64_t begin, int64_t end) {
    uint16_t distance[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, start = task % blocks * kBlock;
      const int64_t count = std::min(kBlock, n - start);
      kernel().distances(from + row * width, to + start * width, count, width, distance);
      std::copy(distance, distance + count, result + row * n + start);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> hamming_topk_cpu(const Tensor& queries, const Tensor& codes, int64_t k) {
  const Tensor a = packed_codes(queries), b = packed_codes(codes);
  const int64_t q = a.size(0), n = b.size(0), width = b.size(1);
  STD_TORCH_CHECK(a.size(1) == width, "queries and codes must have one width");
  STD_TORCH_CHECK(1 <= k && k <= n, "k must lie between 1 and the number of codes");
  Tensor distance = empty_on(queries, {q, k}, Scalar::Int);
  Tensor index = empty_on(queries, {q, k}, Scalar::Long);
  const auto parallel = [](int64_t tasks, const auto& body) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task);
    });
  };
  hamming_topk(kernel(), a.const_data_ptr<uint8_t>(), q, b.const_data_ptr<uint8_t>(), n, width, k,
               distance.mutable_data_ptr<int32_t>(), index.mutable_data_ptr<int64_t>(),
               torch::stable::get_num_threads(), parallel);
  return {distance, index};
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&ragsr::pack_bits));
  m.impl("hamming_distance", TORCH_BOX(&ragsr::hamming_distance));
  m.impl("hamming_topk", TORCH_BOX(&ragsr::hamming_topk_cpu));
}

// For `ragsr env`: the kernel in use here. An unknown RAGSR_CPU gives the sentence that says so.
extern "C" const char* ragsr_cpu_kernel() {
  static const std::string answer = [] {
    try {
      return std::string(ragsr::choose_kernel().name);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return answer.c_str();
}
