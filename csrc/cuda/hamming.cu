// hamming_topk for CUDA tensors: exact, any k, any width, the same bits as every other backend.
//
// Distances are integers from 0 to 8·width, so the k nearest are found by counting instead of by comparing:
//
//   pass 1   count[d]    how many codes lie at distance d                     (histogram in shared memory)
//            cursor[d]   where the first code at distance d goes in the output (running sum of count)
//            last        the distance of the k-th nearest
//   pass 2   every code with d <= last goes to its place. Codes are read in order, a chunk of one block at a time, and
//            within a chunk warp after warp, so that equal distances are placed by growing index:
//
//            codes   | chunk 0: warp 0, warp 1, … warp 7 | chunk 1: … |
//            output  | d = 0 … | d = 1 … | … | d = last, cut off at k |
//
// One block answers one query. The codes are read twice and nothing is stored but the answer.
#include <cuda_runtime.h>

#include "../stable.h"

namespace ragsr {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBytes = 128;
constexpr int kBins = 8 * kMaxBytes + 1;
using Count = unsigned long long;

__device__ inline int set_bits(uint64_t x) { return __popcll(x); }
__device__ inline int set_bits(uint32_t x) { return __popc(x); }
__device__ inline int set_bits(uint8_t x) { return __popc(static_cast<uint32_t>(x)); }

template <class Word>
__device__ int row_distance(const Word* query, const Word* code, int words) {
  int distance = 0;
  for (int j = 0; j < words; ++j) distance += set_bits(static_cast<Word>(query[j] ^ code[j]));
  return distance;
}

template <class Word>
__global__ void __launch_bounds__(kThreads) hamming_topk_kernel(const Word* __restrict__ queries,
                                                                const Word* __restrict__ codes, int64_t n, int words,
                                                                int64_t k, int32_t* __restrict__ distances,
                                                                int64_t* __restrict__ indices) {
  __shared__ Word query[kMaxBytes / sizeof(Word)];
  __shared__ Count cursor[kBins];
  __shared__ int last;

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int bins = 8 * static_cast<int>(sizeof(Word)) * words + 1;
  for (int j = thread; j < words; j += kThreads) query[j] = queries[int64_t{blockIdx.x} * words + j];
  for (int d = thread; d < bins; d += kThreads) cursor[d] = 0;
  __syncthreads();

  for (int64_t i = thread; i < n; i += kThreads) atomicAdd(&cursor[row_distance(query, codes + i * words, words)], 1);
  __syncthreads();
  if (thread == 0) {
    Count before = 0;
    for (int d = 0; d < bins; ++d) {
      const Count here = cursor[d];
      if (before < static_cast<Count>(k)) last = d;
      cursor[d] = before;
      before += here;
    }
  }
  __syncthreads();

  distances += int64_t{blockIdx.x} * k;
  indices += int64_t{blockIdx.x} * k;
  for (int64_t chunk = 0; chunk < n; chunk += kThreads) {
    const int64_t i = chunk + thread;
    const int d = i < n ? row_distance(query, codes + i * words, words) : bins;
    const bool kept = d <= last;
    if (!__syncthreads_or(kept)) continue;
    for (int turn = 0; turn < kWarps; ++turn) {
      if (warp == turn) {
        const unsigned peers = __match_any_sync(0xffffffffu, d);  // lanes of this warp at the same distance
        const int rank = __popc(peers & ((1u << lane) - 1));
        const Count place = kept ? cursor[d] + rank : 0;
        __syncwarp();
        if (kept && place < static_cast<Count>(k)) {
          distances[place] = d;
          indices[place] = i;
        }
        if (kept && rank == 0) cursor[d] += __popc(peers);
      }
      __syncthreads();
    }
  }
}

template <class Word>
void launch(const Tensor& queries, const Tensor& codes, int64_t k, Tensor& distance, Tensor& index, cudaStream_t stream) {
  const int words = static_cast<int>(codes.size(1) / static_cast<int64_t>(sizeof(Word)));
  hamming_topk_kernel<Word><<<static_cast<unsigned>(queries.size(0)), kThreads, 0, stream>>>(
      static_cast<const Word*>(queries.const_data_ptr()), static_cast<const Word*>(codes.const_data_ptr()),
      codes.size(0), words, k, distance.mutable_data_ptr<int32_t>(), index.mutable_data_ptr<int64_t>());
}

// Rows may be read in words of `bytes` when neither the base addresses nor the width get in the way.
bool aligned(const Tensor& queries, const Tensor& codes, size_t bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(queries.const_data_ptr()) |
                    reinterpret_cast<uintptr_t>(codes.const_data_ptr()) | static_cast<uintptr_t>(codes.size(1));
  return bits % bytes == 0;
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

std::tuple<Tensor, Tensor> hamming_topk_cuda(const Tensor& queries, const Tensor& codes, int64_t k) {
  const Tensor a = packed_codes(queries), b = packed_codes(codes);
  const int64_t q = a.size(0), n = b.size(0), width = b.size(1);
  STD_TORCH_CHECK(a.size(1) == width && 1 <= width && width <= kMaxBytes, "queries and codes must have one width");
  STD_TORCH_CHECK(1 <= k && k <= n, "k must lie between 1 and the number of codes");
  Tensor distance = empty_on(queries, {q, k}, Scalar::Int);
  Tensor index = empty_on(queries, {q, k}, Scalar::Long);
  if (q == 0) return {distance, index};
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const cudaStream_t stream = current_stream(a.get_device_index());
  if (aligned(a, b, 8)) {
    launch<uint64_t>(a, b, k, distance, index, stream);
  } else if (aligned(a, b, 4)) {
    launch<uint32_t>(a, b, k, distance, index, stream);
  } else {
    launch<uint8_t>(a, b, k, distance, index, stream);
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "hamming_topk: the kernel did not start: ", cudaGetErrorString(error));
  return {distance, index};
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CUDA, m) { m.impl("hamming_topk", TORCH_BOX(&ragsr::hamming_topk_cuda)); }
