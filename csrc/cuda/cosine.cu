// keep_best for CUDA tensors: the selection of cosine_topk. The kernel stands in cosine.h; a k above 1024 goes through
// torch.topk over all keys.
#include <algorithm>
#include <array>

#include "cosine.h"
#include "stream.h"

namespace ragsr {
namespace {

struct ThreadBlock {
  template <class Phase>
  __device__ __forceinline__ void each(const Phase& phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  __device__ __forceinline__ int count(int* counter) const { return atomicAdd(counter, 1); }
  __device__ __forceinline__ void wait() const { __syncthreads(); }
};

template <class T>
__global__ void __launch_bounds__(kThreads) keep_best_kernel(const int64_t* __restrict__ best, int kept,
                                                             const T* __restrict__ scores, int64_t n, int64_t first,
                                                             int k, int64_t* __restrict__ out) {
  __shared__ BestList list;
  const int64_t row = blockIdx.x;
  keep_best_row(ThreadBlock{}, list, best + row * kept, kept, scores + row * n, n, first, k, out + row * k);
}

// keys [rows, kept + n]: the best so far, then those of the scores
template <class T>
__global__ void __launch_bounds__(kThreads) all_keys_kernel(const int64_t* __restrict__ best, int64_t kept,
                                                            const T* __restrict__ scores, int64_t n, int64_t first,
                                                            int64_t* __restrict__ keys) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < kept + n; i += kThreads)
    keys[row * (kept + n) + i] = i < kept ? best[row * kept + i]
                                          : score_key(static_cast<float>(scores[row * n + i - kept]), first + i - kept);
}

Tensor largest(const Tensor& keys, int64_t k) {
  std::array<StableIValue, 5> stack{torch::stable::detail::from(keys), torch::stable::detail::from(k),
                                    torch::stable::detail::from(int64_t{1}), torch::stable::detail::from(true),
                                    torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::topk", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[1]);  // the indices, owned here and dropped
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
Tensor keep_best_of(const Tensor& best, const Tensor& scores, int64_t first, int64_t k, cudaStream_t stream) {
  const int64_t rows = scores.size(0), n = scores.size(1), kept = best.size(1);
  const auto grid = static_cast<unsigned>(rows);
  const auto from = static_cast<const T*>(scores.const_data_ptr());
  const bool listed = k <= kLargestK;
  Tensor out = empty_on(best, {rows, listed ? k : kept + n}, Scalar::Long);
  if (rows == 0) return empty_on(best, {0, k}, Scalar::Long);
  if (listed) {
    keep_best_kernel<<<grid, kThreads, 0, stream>>>(best.const_data_ptr<int64_t>(), static_cast<int>(kept), from, n,
                                                    first, static_cast<int>(k), out.mutable_data_ptr<int64_t>());
  } else {
    all_keys_kernel<<<grid, kThreads, 0, stream>>>(best.const_data_ptr<int64_t>(), kept, from, n, first,
                                                   out.mutable_data_ptr<int64_t>());
  }
  check_started("keep_best", cudaGetLastError());
  return listed ? out : largest(out, k);
}

// best int64 [rows, kept], sorted; scores [rows, n] of the references from `first` on -> int64 [rows, min(k, kept + n)]
Tensor keep_best(const Tensor& best, const Tensor& scores, int64_t first, int64_t k) {
  const bool wide = scores.scalar_type() == Scalar::Double;
  STD_TORCH_CHECK(best.dim() == 2 && scores.dim() == 2 && best.size(0) == scores.size(0) && best.size(1) <= k,
                  "keep_best: best must be [rows, at most k] and scores [rows, references]");
  STD_TORCH_CHECK(best.scalar_type() == Scalar::Long, "keep_best: best must be int64");
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const Tensor before = torch::stable::contiguous(best);
  const Tensor block = torch::stable::contiguous(wide ? scores : torch::stable::to(scores, Scalar::Float));
  const int64_t number = std::min(k, before.size(1) + block.size(1));
  const auto keep = wide ? keep_best_of<double> : keep_best_of<float>;
  return keep(before, block, first, number, current_stream(scores.get_device_index()));
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CUDA, m) { m.impl("keep_best", TORCH_BOX(&ragsr::keep_best)); }
