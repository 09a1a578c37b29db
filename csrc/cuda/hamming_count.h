// The k nearest for a k that no list holds: distances are counted, then every code goes straight to its place.
//
//     pass 1   count[query, part, d]   codes of the part at distance d
//              place[query, part, d]   where the first of them goes: all nearer codes, and those as near of parts before
//     pass 2   every code whose place is below k goes there. A block reads its part in order, a chunk at a time and
//              within a chunk warp after warp, so that equal distances are placed by growing index:
//
//              codes   | chunk 0: warp 0, warp 1, … warp 7 | chunk 1: … |
//              output  | d = 0 … | d = 1 … | … | cut off at k |
//
// The codes are read twice, and nothing is stored but the counts and the answer.
#pragma once

#include "hamming_codes.h"

namespace ragsr {

using Place = unsigned long long;

struct Counting {
  Codes queries, codes;
  int64_t n, k;
  int64_t length, parts;  // codes of a part, and how many parts
  int bins;               // distances there are
  Place* places;          // [q, parts, bins]: counts, then places
  Answer answer;
};

template <int kWords>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) hamming_count_kernel(Counting counting) {
  __shared__ unsigned count[kBins];
  __shared__ Words<kWords> query;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t part = static_cast<int64_t>(blockIdx.x) % counting.parts;
  const int64_t begin = part * counting.length, end = smaller_of(counting.n, begin + counting.length);
  const int64_t row = static_cast<int64_t>(blockIdx.x) / counting.parts;
  if (thread < kWords) query.word[thread] = load_word(counting.queries, row, thread);
  for (int d = thread; d < counting.bins; d += kThreads) count[d] = 0;
  __syncthreads();
  for (int64_t i = begin + thread; i < end; i += kThreads) {
    int distance[1];
    distances_to(counting.codes, i, &query, distance);
    atomicAdd(&count[distance[0]], 1u);
  }
  __syncthreads();
  Place* out = counting.places + static_cast<int64_t>(blockIdx.x) * counting.bins;
  for (int d = thread; d < counting.bins; d += kThreads) out[d] = count[d];
}

// One block for each query: counts become places.
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) hamming_places_kernel(Counting counting) {
  __shared__ Place before[kBins];
  const int thread = static_cast<int>(threadIdx.x);
  Place* places = counting.places + static_cast<int64_t>(blockIdx.x) * counting.parts * counting.bins;
  for (int d = thread; d < counting.bins; d += kThreads) {
    Place sum = 0;
    for (int64_t part = 0; part < counting.parts; ++part) sum += places[part * counting.bins + d];
    before[d] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    Place sum = 0;
    for (int d = 0; d < counting.bins; ++d) {
      const Place here = before[d];
      before[d] = sum;
      sum += here;
    }
  }
  __syncthreads();
  for (int d = thread; d < counting.bins; d += kThreads) {
    Place sum = before[d];
    for (int64_t part = 0; part < counting.parts; ++part) {
      const Place here = places[part * counting.bins + d];
      places[part * counting.bins + d] = sum;
      sum += here;
    }
  }
}

template <int kWords>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) hamming_place_kernel(Counting counting) {
  __shared__ Place place[kBins];
  __shared__ int nearest;  // distances from here on are of no use
  __shared__ Words<kWords> query;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) / counting.parts;
  const int64_t part = static_cast<int64_t>(blockIdx.x) % counting.parts;
  const int64_t begin = part * counting.length, end = smaller_of(counting.n, begin + counting.length);
  const auto k = static_cast<Place>(counting.k);
  if (thread < kWords) query.word[thread] = load_word(counting.queries, row, thread);
  if (thread == 0) nearest = counting.bins;
  __syncthreads();
  const Place* from = counting.places + static_cast<int64_t>(blockIdx.x) * counting.bins;
  for (int d = thread; d < counting.bins; d += kThreads) {
    place[d] = from[d];
    if (from[d] >= k) atomicMin(&nearest, d);  // places rise with the distance
  }
  __syncthreads();
  const int useless = nearest;
  for (int64_t chunk = begin; chunk < end; chunk += kThreads) {
    const int64_t i = chunk + thread;
    int distance[1] = {counting.bins};
    if (i < end) distances_to(counting.codes, i, &query, distance);
    const int d = distance[0];
    const bool kept = d < useless;
    if (!__syncthreads_or(kept)) continue;
    for (int turn = 0; turn < kThreads / kWarp; ++turn) {
      if (warp == turn) {
        const unsigned peers = __match_any_sync(kAllLanes, d);  // lanes of this warp at the same distance
        const int rank = __popc(peers & ((1u << lane) - 1));
        const Place at = kept ? place[d] + rank : k;
        __syncwarp();
        if (at < k) counting.answer.write(row * counting.k + static_cast<int64_t>(at), key_of(d, i));
        if (kept && rank == 0) place[d] += __popc(peers);
      }
      __syncthreads();
    }
  }
}

}  // namespace ragsr
