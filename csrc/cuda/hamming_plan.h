// hamming_topk on a GPU: which kernels, in which order, over which pieces.
//
//     cube     codes of 8 and 16 bits, many queries   hamming_cube.h
//     lists    k up to 1024                           hamming_scan.h, for many queries hamming_mma.h
//     counts   any k                                  hamming_count.h
//
// All three give the k smallest in the order (distance, index). `Device` launches kernels and lends memory, `workspace`
// bytes at a time where the work can be cut up; the tests have one that runs on the host. Numbers are derived from data
// sheets and were not yet measured on a GPU.
#pragma once

#include "hamming_count.h"
#include "hamming_cube.h"
#include "hamming_mma.h"
#include "hamming_scan.h"

namespace ragsr {

constexpr int64_t kBlocksPerProcessor = 4;
constexpr int64_t kSmallestPart = 4096;            // codes; less is not worth the list it makes
constexpr int64_t kMergedKeys = int64_t{1} << 16;  // keys that one block merges, at most
constexpr int64_t kMmaQueries = 16;                // from so many queries on, tensor cores are worth their while
constexpr int64_t kMmaLargestK = 128;              // the lists of 64 queries share a block's memory

struct Search {
  const uint8_t* queries;
  const uint8_t* codes;
  int64_t q, n, width, k;
  int32_t* distance;
  int64_t* index;

  // The same search for the queries [from, from + count).
  Search rows(int64_t from, int64_t count) const {
    return {queries + from * width, codes, count, n, width, k, distance + from * k, index + from * k};
  }
};

// Parts of the codes, so that `groups` of queries times parts fill the device; at most `most`.
struct Parts {
  int64_t length, count;
};
inline Parts cut_codes(int64_t n, int64_t groups, int64_t blocks, int64_t most) {
  const int64_t wanted = smaller_of(divide_up(blocks, groups), divide_up(n, kSmallestPart));
  const int64_t count = larger_of(1, smaller_of(wanted, most));
  const int64_t even = divide_up(divide_up(n, count), kThreads) * kThreads;
  const int64_t length = smaller_of(even, kLargestPart);
  return {length, divide_up(n, length)};
}

// ---------------------------------------------------------------- cube

// Nanoseconds on an H100-class GPU, from data sheets: 3.6 T pairs/s of one popcount each against a build that is mostly
// launches and barriers.
inline bool cube_pays(const Search& s) {
  if (s.width > 2 || s.k > kCubeLargestK || s.n >= int64_t{1} << kCubeIndexBits) return false;
  const double scan = static_cast<double>(s.q) * static_cast<double>(s.n) * 0.28e-3;
  const double build = 15000 + 600 * static_cast<double>(s.k) + 0.2 * static_cast<double>(s.n);
  return build < scan;
}

template <class Device>
void cube_topk(Device& device, const Search& s) {
  int K = 1;
  while (K < s.k) K *= 2;
  const int bits = static_cast<int>(8 * s.width);
  const int64_t cells = int64_t{1} << bits;
  const Cube cube{static_cast<uint32_t*>(device.lend(cells * K * 4)), bits, K, s.codes, s.n};
  device.launch(cube_insert_kernel, divide_up(cells, kCubeCells), 0, cube);
  const int room = K * kCubeCells <= kCubeRoom ? kCubeCells : kCubeRoom / K;  // cells of a block
  for (int from = 0, done; from < bits; from += done) {
    for (done = 0; from + done < bits && 2 << done <= room;) ++done;
    const int columns = static_cast<int>(smaller_of(int64_t{1} << from, room >> done));
    const int64_t inside = int64_t{columns} << done;
    device.launch(cube_pass_kernel, cells / inside, static_cast<int>(inside) * K * 4, cube, from, done, columns);
  }
  device.launch(cube_lookup_kernel, divide_up(s.q * s.k, kThreads), 0, cube, s.queries, s.q, s.k,
                Answer{s.distance, s.index});
}

// ---------------------------------------------------------------- lists

// A power of two with room for two times k.
inline int capacity_from(int least, int64_t k) {
  int capacity = least;
  while (capacity < 2 * k) capacity *= 2;
  return capacity;
}

// `kernel` has the lists of kQueries queries in a block. Parts are merged by another.
template <int kQueries, class Device, class Kernel>
void scan_and_merge(Device& device, const Search& s, int capacity, Kernel kernel) {
  const int64_t blocks = kBlocksPerProcessor * device.processors();
  const Parts parts = cut_codes(s.n, divide_up(s.q, kQueries), blocks, kMergedKeys / s.k);
  const int64_t bytes = parts.count == 1 ? 0 : parts.count * s.k * 8;  // of a query
  const int64_t groups = bytes == 0 ? s.q : divide_up(device.workspace(), bytes * kQueries);
  const int64_t rows = smaller_of(s.q, groups * kQueries);
  auto* lists = bytes == 0 ? nullptr : static_cast<uint64_t*>(device.lend(rows * bytes));
  for (int64_t from = 0; from < s.q; from += rows) {
    const Search some = s.rows(from, smaller_of(rows, s.q - from));
    const Scan scan{codes_at(some.queries, s.width), codes_at(s.codes, s.width), some.q, s.n, s.k, parts.length,
                    parts.count, capacity, lists, Answer{some.distance, some.index}};
    device.launch(kernel, divide_up(some.q, kQueries) * parts.count, kQueries * capacity * 4, scan);
    const int room = capacity_from(kThreads, s.k);
    if (parts.count > 1) device.launch(hamming_merge_kernel, some.q, room * 8, scan, room);
  }
}

template <int kQueries, class Device>
void lists_topk(Device& device, const Search& s) {
  with_words(s.width, [&](auto words) {
    scan_and_merge<kQueries>(device, s, capacity_from(kThreads, s.k),
                             hamming_scan_kernel<decltype(words)::value, kQueries>);
  });
}

template <Formulation kHow, class Device>
void mma_topk(Device& device, const Search& s) {
  with_words(s.width, [&](auto words) {
    using Of = Product<decltype(words)::value, kHow>;
    scan_and_merge<Of::kQueries>(device, s, capacity_from(kMmaCodes, s.k),
                                 hamming_mma_kernel<decltype(words)::value, kHow>);
  });
}

// ---------------------------------------------------------------- counts

template <int kWords, class Device>
void count_and_place(Device& device, const Search& s, const Parts& parts, Place* places) {
  const Counting counting{codes_at(s.queries, s.width), codes_at(s.codes, s.width), s.n, s.k, parts.length, parts.count,
                          static_cast<int>(8 * s.width + 1), places, Answer{s.distance, s.index}};
  device.launch(hamming_count_kernel<kWords>, s.q * parts.count, 0, counting);
  device.launch(hamming_places_kernel, s.q, 0, counting);
  device.launch(hamming_place_kernel<kWords>, s.q * parts.count, 0, counting);
}

template <class Device>
void counts_topk(Device& device, const Search& s) {
  const Parts parts = cut_codes(s.n, s.q, kBlocksPerProcessor * device.processors(), s.n);
  const int64_t bytes = parts.count * (8 * s.width + 1) * 8;  // of a query
  const int64_t rows = smaller_of(s.q, divide_up(device.workspace(), bytes));
  auto* places = static_cast<Place*>(device.lend(rows * bytes));
  for (int64_t from = 0; from < s.q; from += rows) {
    const Search some = s.rows(from, smaller_of(rows, s.q - from));
    with_words(s.width, [&](auto words) { count_and_place<decltype(words)::value>(device, some, parts, places); });
  }
}

// distance, index [q, k] of queries [q, width] among codes [n, width]; q >= 1, 1 <= k <= n, 1 <= width <= kMaxBytes.
template <class Device>
void hamming_topk(Device& device, const Search& s) {
  if (cube_pays(s)) return cube_topk(device, s);
  if (s.k > kLargestK) return counts_topk(device, s);
  if (s.q >= kMmaQueries && s.k <= kMmaLargestK) {
    switch (device.formulation()) {
      case Formulation::with_xor: return mma_topk<Formulation::with_xor>(device, s);
      case Formulation::with_and: return mma_topk<Formulation::with_and>(device, s);
      case Formulation::with_bytes: return mma_topk<Formulation::with_bytes>(device, s);
    }
  }
  if (s.q == 1) return lists_topk<1>(device, s);
  if (s.q <= 4) return lists_topk<4>(device, s);
  lists_topk<8>(device, s);
}

}  // namespace ragsr
