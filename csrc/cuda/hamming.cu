// hamming_topk for CUDA tensors: exact, any k, any width, the same bits as every other backend. What runs when:
// hamming_plan.h.
#include "hamming_plan.h"
#include "stream.h"

namespace ragsr {
namespace {

void check(cudaError_t error) { check_started("hamming_topk", error); }

// The current stream of the device of `like`, and memory of PyTorch's own allocator.
class StreamDevice {
 public:
  explicit StreamDevice(const Tensor& like) : like_(like), stream_(current_stream(like.get_device_index())) {
    check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, like.get_device_index()));
    cudaFuncAttributes compiled;
    check(cudaFuncGetAttributes(&compiled, hamming_merge_kernel));
    generation_ = compiled.ptxVersion / 10;  // of the code that runs, which may be older than the device
  }

  int processors() const { return processors_; }
  int64_t workspace() const { return int64_t{256} << 20; }
  Formulation formulation() const {
    if (generation_ < 9) return Formulation::with_xor;
    return generation_ == 9 ? Formulation::with_and : Formulation::with_bytes;
  }

  void* lend(int64_t bytes) {
    lent_.push_back(empty_on(like_, {bytes}, Scalar::Byte));
    return lent_.back().mutable_data_ptr();
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int shared, const Arguments&... arguments) {
    constexpr int kWithoutAsking = 48 << 10;
    if (shared > kWithoutAsking)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared), stream_>>>(arguments...);
    check(cudaGetLastError());
  }

 private:
  Tensor like_;
  cudaStream_t stream_;
  int processors_ = 1, generation_ = 0;
  std::vector<Tensor> lent_;
};

std::tuple<Tensor, Tensor> hamming_topk_cuda(const Tensor& queries, const Tensor& codes, int64_t k) {
  const Tensor a = packed_codes(queries), b = packed_codes(codes);
  const int64_t q = a.size(0), n = b.size(0), width = b.size(1);
  STD_TORCH_CHECK(a.size(1) == width && 1 <= width && width <= kMaxBytes, "queries and codes must have one width");
  STD_TORCH_CHECK(1 <= k && k <= n, "k must lie between 1 and the number of codes");
  Tensor distance = empty_on(queries, {q, k}, Scalar::Int);
  Tensor index = empty_on(queries, {q, k}, Scalar::Long);
  if (q == 0) return {distance, index};
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  StreamDevice device(a);
  hamming_topk(device, {a.const_data_ptr<uint8_t>(), b.const_data_ptr<uint8_t>(), q, n, width, k,
                        distance.mutable_data_ptr<int32_t>(), index.mutable_data_ptr<int64_t>()});
  return {distance, index};
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CUDA, m) { m.impl("hamming_topk", TORCH_BOX(&ragsr::hamming_topk_cuda)); }
