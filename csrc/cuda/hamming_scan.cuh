// The k nearest of a group of queries in a part of the codes, and the merging of parts.
//
//     block        one part of the codes x up to kQueries queries
//     thread       kRows codes of a tile in registers, compared with every query of the group (in shared memory)
//     tile         kThreads * kRows codes, in the order of their index; the first has kThreads
//     list         the k nearest so far of each query; warp g cuts the list of query g
//
//     codes   | part 0: tile, tile, ... | part 1 ...   |      one block each
//     lists   | k keys                  | k keys       | ->   one block for each query merges them
//
// A code that is as far as the k-th kept one comes later, has the higher index, and is of no use: the test is d < bound.
// Inside a tile indices do not come in order; there whole keys are compared. A key of a list is
// distance << kPartBits | index in the part, so that 32 bits hold it.
#pragma once

#include "hamming_codes.cuh"
#include "hamming_lists.cuh"

namespace ragsr {

constexpr int kPartBits = 21;  // parts of up to 2 million codes; 2^11 distances above
constexpr int64_t kLargestPart = int64_t{1} << kPartBits;

struct Scan {
  Codes queries, codes;
  int64_t q, n, k;
  int64_t length, parts;  // codes of a part, and how many parts
  uint64_t* lists;        // [q, parts, k] keys, kNoKey behind the last; not used where there is one part
  Answer answer;
};

// Codes that a thread holds at a time: short ones several, for fewer barriers.
template <int kWords>
constexpr int kRowsOfThread = kWords <= 2 ? 4 : kWords <= 8 ? 2 : 1;

template <int kQueries>
struct ScanShared {
  int count[kQueries];
  uint32_t worst[kQueries];
};

// What a block writes for query `row`: its sorted list as keys over all codes, or the answer itself.
__device__ inline void write_list(const Scan& scan, const List<uint32_t>& list, int64_t row, int64_t part, int rank,
                                  int size) {
  constexpr uint32_t kInPart = (uint32_t{1} << kPartBits) - 1;
  for (int64_t j = rank; j < scan.k; j += size) {
    uint64_t key = kNoKey;
    if (j < *list.count)
      key = key_of(list.keys[j] >> kPartBits, part * scan.length + static_cast<int64_t>(list.keys[j] & kInPart));
    if (scan.parts == 1)
      scan.answer.write(row * scan.k + j, key);
    else
      scan.lists[(row * scan.parts + part) * scan.k + j] = key;
  }
}

template <int kWords, int kQueries>
__global__ void __launch_bounds__(kThreads, kWords < 16 ? kBlocksAtOnce : 1) hamming_scan_kernel(Scan scan) {
  constexpr int kRows = kRowsOfThread<kWords>;
  static_assert(kRows * kQueries <= 32, "what is pending must fit into a word");
  static_assert(kQueries <= kThreads / kWarp, "every list has a warp");
  __shared__ ScanShared<kQueries> shared;
  __shared__ Words<kWords> query[kQueries];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int64_t part = static_cast<int64_t>(blockIdx.x) % scan.parts;
  const int64_t row = static_cast<int64_t>(blockIdx.x) / scan.parts * kQueries;  // of the first query
  const int64_t begin = part * scan.length, end = smaller_of(scan.n, begin + scan.length);
  const int capacity = capacity_for(scan.k);
  const auto list_of = [&](int g) {
    auto* keys = reinterpret_cast<uint32_t*>(dynamic_shared()) + g * capacity;
    return List<uint32_t>{keys, shared.count + g, shared.worst + g, static_cast<int>(scan.k), capacity};
  };

  if (thread < kQueries) {
    uint32_t words[kWords] = {};
    const bool there = row + thread < scan.q;
    if (there) load_code(scan.queries, row + thread, words);
    for (int w = 0; w < kWords; ++w) query[thread].word[w] = words[w];
    shared.count[thread] = 0;
    shared.worst[thread] = there ? List<uint32_t>::kNone : 0;  // nothing is nearer than 0: no hit where no query is
  }
  __syncthreads();

  uint32_t bound[kQueries];
#pragma unroll
  for (int g = 0; g < kQueries; ++g) bound[g] = shared.worst[g] >> kPartBits;
  int64_t rows = kThreads;  // of the tile
  for (int64_t tile = begin; tile < end; tile += rows, rows = kThreads * kRows) {
    const int64_t stop = smaller_of(end, tile + rows);
    uint32_t pending = 0;  // bit r * kQueries + g: code r is near query g
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = tile + r * kThreads + thread;
      if (i >= stop) continue;
      uint32_t code[kWords];
      load_code(scan.codes, i, code);
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
        const auto distance = static_cast<uint32_t>(distance_between(code, query[g].word));
        pending |= static_cast<uint32_t>(distance < bound[g]) << (r * kQueries + g);
      }
    }
    bool changed = false;
    while (__syncthreads_or(pending != 0)) {
      changed = true;
      for (uint32_t left = pending; left != 0; left &= left - 1) {  // rare: the code is read and compared once more
        const int bit = __ffs(static_cast<int>(left)) - 1, g = bit % kQueries;
        const int64_t i = tile + bit / kQueries * kThreads + thread;
        uint32_t code[kWords];
        load_code(scan.codes, i, code);
        const auto distance = static_cast<uint32_t>(distance_between(code, query[g].word));
        if (list_of(g).put(distance << kPartBits | static_cast<uint32_t>(i - begin))) pending &= ~(uint32_t{1} << bit);
      }
      __syncthreads();
      if (warp < kQueries && shared.count[warp] >= list_of(warp).enough()) list_of(warp).cut(WarpTeam());
    }
    if (!changed) continue;
#pragma unroll
    for (int g = 0; g < kQueries; ++g) bound[g] = shared.worst[g] >> kPartBits;
  }

  __syncthreads();
  if (warp >= kQueries || row + warp >= scan.q) return;
  const WarpTeam team;
  list_of(warp).cut(team);
  write_list(scan, list_of(warp), row + warp, part, team.rank, team.size);
}

// One block for each query: the k smallest of the keys of all parts.
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) hamming_merge_kernel(Scan scan) {
  __shared__ int count;
  __shared__ uint64_t worst;
  const BlockTeam team;
  const List<uint64_t> list{reinterpret_cast<uint64_t*>(dynamic_shared()), &count, &worst, static_cast<int>(scan.k),
                            capacity_for(scan.k)};
  if (team.rank == 0) count = 0, worst = kNoKey;
  __syncthreads();
  const int64_t row = blockIdx.x, number = scan.parts * scan.k;
  for (int64_t start = 0; start < number; start += team.size) {
    const int64_t i = start + team.rank;
    const uint64_t key = i < number ? scan.lists[row * number + i] : kNoKey;
    bool pending = key < worst;
    while (__syncthreads_or(pending)) {
      if (pending) pending = !list.put(key);
      __syncthreads();
      if (count >= list.enough()) list.cut(team);
    }
  }
  list.cut(team);
  for (int64_t j = team.rank; j < scan.k; j += team.size) scan.answer.write(row * scan.k + j, list.keys[j]);
}

}  // namespace ragsr
