// Hamming distance and exact top-k on the CPU, free of torch: shared by the op (ragsr._cpu) and the index
// (ragsr._index).
//
//     hamming_distances.h   one query against a row of codes, for each instruction set
//     hamming_nearest.h     the k nearest of one query while codes go by
//     hamming_sliced.h      many queries against many codes: addition on bit planes
//     hamming_cube.h        codes of 8 and 16 bits: the answer for every possible query
//     hamming_targets.h     the two above, compiled for each instruction set
//     hamming_kernels.h     which of them this machine has
//     hamming_table.h       the tables of hamming_cube.h: when they pay, and kept for a gallery that does not change
//
// Whatever is chosen, however the work is cut up, the answer is the same: the k smallest in the order (distance, index).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "hamming_kernels.h"
#include "hamming_nearest.h"
#include "hamming_table.h"

namespace ragsr {

// ---------------------------------------------------------------- scan

// How q queries x n codes are cut into tasks: groups of queries times parts of the codes.
struct ScanPlan {
  int64_t rows;      // queries of a group
  int64_t groups;
  int64_t length;    // codes of a part
  int64_t parts;
  bool counting;     // k is no small share of the codes: count distances instead of keeping a list
};

// Large groups share the tables of a block among many queries; parts are made when the groups do not occupy the
// threads. Parts are whole blocks of 512 codes, and long: each begins with a bound that is still wide.
inline ScanPlan plan_scan(int64_t q, int64_t n, int64_t k, int64_t threads) {
  constexpr int64_t kGroup = 128, kBlock = 512, kSmallestPart = 1 << 15, kKeys = 1 << 21;
  ScanPlan plan{};
  plan.counting = k >= 64 && k > n / 8;
  plan.rows = plan.counting ? 1 : std::min(kGroup, std::max<int64_t>(1, kKeys / k));
  plan.groups = divide_up(q, plan.rows);
  plan.parts = 1;
  if (plan.groups < 2 * threads) {
    plan.parts = std::max<int64_t>(1, std::min(divide_up(threads, plan.groups), n / kSmallestPart));
    if (plan.parts == 1) plan.groups = std::min(q, divide_up(plan.groups, threads) * threads);
  }
  plan.rows = divide_up(q, plan.groups);
  plan.groups = divide_up(q, plan.rows);
  plan.length = divide_up(divide_up(n, plan.parts), kBlock) * kBlock;
  plan.parts = divide_up(n, plan.length);
  return plan;
}

// Calls found(row, keys, number) with the sorted keys of the nearest codes in [begin, end) for each of `rows` queries.
template <class Found>
void scan_group(const CpuKernel& kernel, const uint8_t* queries, int64_t rows, const uint8_t* codes, int64_t begin,
                int64_t end, int64_t width, int64_t k, const Found& found) {
  const int64_t room = Nearest::room(k);
  std::vector<uint64_t> keys(static_cast<size_t>(rows * room));
  std::vector<Nearest> nearest;
  nearest.reserve(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) nearest.emplace_back(&keys[static_cast<size_t>(i * room)], k);
  kernel.scan(queries, rows, codes + begin * width, end - begin, width, begin, nearest.data());
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t number = nearest[static_cast<size_t>(i)].finish();
    found(i, nearest[static_cast<size_t>(i)].keys(), number);
  }
}

template <class Found>
void count_group(const CpuKernel& kernel, const uint8_t* queries, int64_t rows, const uint8_t* codes, int64_t begin,
                 int64_t end, int64_t width, int64_t k, const Found& found) {
  const int64_t number = std::min(k, end - begin);
  std::vector<uint16_t> distance(static_cast<size_t>(end - begin));
  std::vector<uint64_t> keys(static_cast<size_t>(number));
  for (int64_t i = 0; i < rows; ++i) {
    kernel.distances(queries + i * width, codes + begin * width, end - begin, width, distance.data());
    nearest_by_counting(distance.data(), end - begin, begin, number, 8 * width, keys.data());
    found(i, keys.data(), number);
  }
}

// The sorted keys that the parts found for one query, in one sorted row.
inline std::vector<uint64_t> merge_parts(const std::vector<std::vector<uint64_t>>& found, int64_t first,
                                         int64_t parts) {
  std::vector<uint64_t> keys;
  for (int64_t part = first; part < first + parts; ++part) {
    const std::vector<uint64_t>& more = found[static_cast<size_t>(part)];
    const auto middle = static_cast<std::ptrdiff_t>(keys.size());
    keys.insert(keys.end(), more.begin(), more.end());
    std::inplace_merge(keys.begin(), keys.begin() + middle, keys.end());
  }
  return keys;
}

template <class Parallel>
void scan_topk(const CpuKernel& kernel, const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n,
               int64_t width, const Answer& answer, int64_t threads, const Parallel& parallel) {
  const ScanPlan plan = plan_scan(q, n, answer.k, threads);
  std::vector<std::vector<uint64_t>> found(static_cast<size_t>(plan.parts > 1 ? q * plan.parts : 0));
  parallel(plan.groups * plan.parts, [&](int64_t task) {
    const int64_t row = task / plan.parts * plan.rows, part = task % plan.parts;
    const int64_t begin = part * plan.length, end = std::min(n, begin + plan.length);
    const auto keep = [&](int64_t i, const uint64_t* keys, int64_t number) {
      if (plan.parts == 1) return answer.write(row + i, keys);
      found[static_cast<size_t>((row + i) * plan.parts + part)].assign(keys, keys + number);
    };
    const auto group = plan.counting ? count_group<decltype(keep)> : scan_group<decltype(keep)>;
    group(kernel, queries + row * width, std::min(plan.rows, q - row), codes, begin, end, width, answer.k, keep);
  });
  if (plan.parts == 1) return;
  for (int64_t row = 0; row < q; ++row) answer.write(row, merge_parts(found, row * plan.parts, plan.parts).data());
}

// ---------------------------------------------------------------- the k nearest

// distance, index [q, k] from queries [q, width] and codes [n, width], 1 <= k <= n.
// `parallel(tasks, body)` calls body(task) for every task and returns when all are done, on up to `threads` threads.
template <class Parallel>
void hamming_topk(const CpuKernel& kernel, const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n,
                  int64_t width, int64_t k, int32_t* distance, int64_t* index, int64_t threads, Parallel parallel) {
  if (q == 0) return;
  const Answer answer{distance, index, k};
  if (CubeTable::possible(n, width, k)) {
    const auto build = [&] { return std::make_shared<const CubeTable>(kernel, codes, n, width, k, parallel); };
    const auto table = table_cache().find_or_build(codes, n, width, k, TableCosts(q, n, width, k), build);
    if (table) return table->look_up(queries, q, answer, parallel);
  }
  scan_topk(kernel, queries, q, codes, n, width, answer, threads, parallel);
}

// The same for a caller that knows a kernel by its distances alone.
template <class Parallel>
void hamming_topk(DistanceKernel distances, const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n,
                  int64_t width, int64_t k, int32_t* distance, int64_t* index, int64_t threads, Parallel parallel) {
  const std::vector<CpuKernel> kernels = available_kernels();
  CpuKernel chosen = kernels.front();
  for (const CpuKernel& kernel : kernels)
    if (kernel.distances == distances) chosen = kernel;
  hamming_topk(chosen, queries, q, codes, n, width, k, distance, index, threads, parallel);
}

}  // namespace ragsr
