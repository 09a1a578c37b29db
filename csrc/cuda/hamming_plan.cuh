// hamming_topk on a GPU: which kernels, in which order, over which pieces.
//
//     cube     codes of 8 and 16 bits, many queries   hamming_cube.cuh
//     lists    k up to 1024                           hamming_scan.cuh
//     counts   any k                                  hamming_count.cuh
//
// All three give the k smallest in the order (distance, index). `Device` launches kernels and lends memory, `workspace`
// bytes at a time where the work can be cut up; the tests have one that runs on the host. The numbers here are derived from data sheets and were not yet measured on a GPU.
#pragma once

#include "hamming_count.cuh"
#include "hamming_cube.cuh"
#include "hamming_scan.cuh"

namespace ragsr {

constexpr int64_t kBlocksPerProcessor = 4;
constexpr int64_t kSmallestPart = 4096;              // codes; less is not worth the list it makes
constexpr int64_t kMergedKeys = int64_t{1} << 16;    // keys that one block merges, at most

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

template <int kWords, int kQueries, class Device>
void scan_and_merge(Device& device, const Search& s, const Parts& parts, uint64_t* lists) {
  const Scan scan{codes_at(s.queries, s.width), codes_at(s.codes, s.width), s.q, s.n, s.k, parts.length, parts.count,
                  lists, Answer{s.distance, s.index}};
  const int capacity = capacity_for(s.k);
  device.launch(hamming_scan_kernel<kWords, kQueries>, divide_up(s.q, kQueries) * parts.count, kQueries * capacity * 4,
                scan);
  if (parts.count > 1) device.launch(hamming_merge_kernel, s.q, capacity * 8, scan);
}

template <int kQueries, class Device>
void lists_topk(Device& device, const Search& s) {
  const int64_t blocks = kBlocksPerProcessor * device.processors();
  const Parts parts = cut_codes(s.n, divide_up(s.q, kQueries), blocks, kMergedKeys / s.k);
  const int64_t bytes = parts.count == 1 ? 0 : parts.count * s.k * 8;  // of a query
  const int64_t rows = bytes == 0 ? s.q : smaller_of(s.q, divide_up(device.workspace() / bytes, kQueries) * kQueries);
  auto* lists = bytes == 0 ? nullptr : static_cast<uint64_t*>(device.lend(rows * bytes));
  for (int64_t from = 0; from < s.q; from += rows) {
    const Search some = s.rows(from, smaller_of(rows, s.q - from));
    with_words(s.width, [&](auto words) { scan_and_merge<decltype(words)::value, kQueries>(device, some, parts, lists); });
  }
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
  if (s.q == 1) return lists_topk<1>(device, s);
  if (s.q <= 4) return lists_topk<4>(device, s);
  lists_topk<8>(device, s);
}

}  // namespace ragsr
