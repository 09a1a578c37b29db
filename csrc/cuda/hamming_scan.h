// The k nearest of a group of queries in a part of the codes, and the merging of parts.
//
//     block        one part of the codes x up to kQueries queries
//     thread       kRows codes of a tile, each in registers and compared with every query of the group
//     tile         kThreads * kRows codes, in the order of their index; the first is short, so that bounds come down
//     list         the k nearest so far of each query, cut by a warp
//
//     codes   | part 0: tile, tile, ... | part 1 ...   |      one block each
//     lists   | k keys                  | k keys       | ->   one block for each query merges them
//
// A code that is as far as the k-th kept one comes later, has the higher index, and is of no use: the test is d < bound.
// A key of a list is distance << kPartBits | index in the part, so that 32 bits hold it.
#pragma once

#include "hamming_codes.h"
#include "hamming_lists.h"

namespace ragsr {

constexpr int kPartBits = 21;  // parts of up to 2 million codes; 2^11 distances above
constexpr int64_t kLargestPart = int64_t{1} << kPartBits;
constexpr int64_t kLargestK = 1024;
constexpr int kWarps = kThreads / kWarp;

struct Scan {
  Codes queries, codes;
  int64_t q, n, k;
  int64_t length, parts;  // codes of a part, and how many parts
  int capacity;           // of a list
  uint64_t* lists;        // [q, parts, k] keys, kNoKey behind the last; not used where there is one part
  Answer answer;
};

// What a block works on.
struct Piece {
  int64_t row, part, begin, end;  // first query; part, and its codes
  template <int kQueries>
  __device__ static Piece of_block(const Scan& scan) {
    const int64_t block = blockIdx.x, part = block % scan.parts, begin = part * scan.length;
    return {block / scan.parts * kQueries, part, begin, smaller_of(scan.n, begin + scan.length)};
  }
};

// The lists of a group, in shared memory.
struct Lists {
  const Scan& scan;
  int* count;
  uint32_t* worst;

  __device__ List<uint32_t> operator[](int g) const {
    auto* keys = reinterpret_cast<uint32_t*>(dynamic_shared()) + g * scan.capacity;
    return {keys, count + g, worst + g, static_cast<int>(scan.k), scan.capacity};
  }
  // Nothing is nearer than 0: no code is offered to a query that is not there.
  __device__ void clear(int g, bool there) const {
    count[g] = 0;
    worst[g] = there ? List<uint32_t>::kNone : 0;
  }
  __device__ int bound(int g) const { return static_cast<int>(worst[g] >> kPartBits); }
};

// Cuts the lists that are due, until everybody has got rid of his keys: `retry` puts once more what found no room, and
// says whether a cut is due. Returns whether there was one; bounds have changed then.
template <int kQueries, class Retry>
__device__ bool settle(const Lists& lists, bool full, const Retry& retry) {
  bool cut = false;
  while (__syncthreads_or(full)) {
    for (int g = static_cast<int>(threadIdx.x) / kWarp; g < kQueries; g += kWarps)
      if (lists.count[g] >= enough_for(lists.scan.k)) lists[g].cut(WarpTeam());
    __syncthreads();
    full = retry();
    cut = true;
  }
  return cut;
}

// Sorted lists as keys over all codes, or the answer itself.
template <int kQueries>
__device__ void write_lists(const Lists& lists, const Piece& piece) {
  constexpr uint32_t kInPart = (uint32_t{1} << kPartBits) - 1;
  const Scan& scan = lists.scan;
  const WarpTeam team;
  __syncthreads();
  for (int g = static_cast<int>(threadIdx.x) / kWarp; g < kQueries && piece.row + g < scan.q; g += kWarps) {
    const List<uint32_t> list = lists[g];
    list.cut(team);
    const int64_t row = piece.row + g;
    for (int64_t j = team.rank; j < scan.k; j += team.size) {
      uint64_t key = kNoKey;
      if (j < *list.count)
        key = key_of(list.keys[j] >> kPartBits, piece.begin + static_cast<int64_t>(list.keys[j] & kInPart));
      if (scan.parts == 1)
        scan.answer.write(row * scan.k + j, key);
      else
        scan.lists[(row * scan.parts + piece.part) * scan.k + j] = key;
    }
  }
}

// Codes that a thread compares at a time: short ones several, for fewer barriers.
template <int kWords>
constexpr int kRowsOfThread = kWords <= 2 ? 4 : kWords <= 8 ? 2 : 1;

template <int kWords, int kQueries>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) hamming_scan_kernel(Scan scan) {
  constexpr int kRows = kRowsOfThread<kWords>;
  static_assert(kRows * kQueries <= 32, "what is pending must fit into a word");
  __shared__ int count[kQueries];
  __shared__ uint32_t worst[kQueries];
  __shared__ Words<kWords> query[kQueries];
  const int thread = static_cast<int>(threadIdx.x);
  const Piece piece = Piece::of_block<kQueries>(scan);
  const Lists lists{scan, count, worst};
  if (thread < kQueries) {
    const bool there = piece.row + thread < scan.q;
    for (int w = 0; w < kWords; ++w) query[thread].word[w] = there ? load_word(scan.queries, piece.row + thread, w) : 0;
    lists.clear(thread, there);
  }
  __syncthreads();

  int bound[kQueries];
#pragma unroll
  for (int g = 0; g < kQueries; ++g) bound[g] = lists.bound(g);
  int64_t rows = smaller_of(enough_for(scan.k), kThreads);  // of the tile
  for (int64_t tile = piece.begin; tile < piece.end; tile += rows, rows = kThreads * kRows) {
    const int64_t stop = smaller_of(piece.end, tile + rows);
    uint32_t pending = 0;  // bit r * kQueries + g: code r is near query g
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = tile + r * kThreads + thread;
      if (i >= stop) continue;
      int distance[kQueries];
      distances_to(scan.codes, i, query, distance);
#pragma unroll
      for (int g = 0; g < kQueries; ++g)
        pending |= static_cast<uint32_t>(distance[g] < bound[g]) << (r * kQueries + g);
    }
    const auto put_pending = [&] {  // rare: the code is read and compared once more
      bool full = false;
      for (uint32_t left = pending; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1, g = bit % kQueries;
        const int64_t i = tile + bit / kQueries * kThreads + thread;
        int distance[1];
        distances_to(scan.codes, i, query + g, distance);
        const uint32_t key = static_cast<uint32_t>(distance[0]) << kPartBits | static_cast<uint32_t>(i - piece.begin);
        if (lists[g].put(key, full)) pending &= ~(uint32_t{1} << bit);
      }
      return full;
    };
    if (!settle<kQueries>(lists, put_pending(), put_pending)) continue;
#pragma unroll
    for (int g = 0; g < kQueries; ++g) bound[g] = lists.bound(g);
  }
  write_lists<kQueries>(lists, piece);
}

// One block for each query: the k smallest of the keys of all parts.
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) hamming_merge_kernel(Scan scan, int capacity) {
  __shared__ int count;
  __shared__ uint64_t worst;
  const BlockTeam team;
  const List<uint64_t> list{reinterpret_cast<uint64_t*>(dynamic_shared()), &count, &worst, static_cast<int>(scan.k),
                            capacity};
  if (team.rank == 0) count = 0, worst = kNoKey;
  __syncthreads();
  const int64_t row = blockIdx.x, number = scan.parts * scan.k;
  for (int64_t start = 0; start < number; start += team.size) {
    const int64_t i = start + team.rank;
    const uint64_t key = i < number ? scan.lists[row * number + i] : kNoKey;
    bool full = false, done = list.put(key, full);
    while (__syncthreads_or(full)) {
      list.cut(team);
      full = false;
      if (!done) done = list.put(key, full);
    }
  }
  list.cut(team);
  for (int64_t j = team.rank; j < scan.k; j += team.size) scan.answer.write(row * scan.k + j, list.keys[j]);
}

}  // namespace ragsr
