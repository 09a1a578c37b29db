// Hamming distance and exact top-k on the CPU, free of torch: shared by the op (ragsr._cpu) and the index
// (ragsr._index).
//
//     hamming_distances.h   one query against a row of codes, for each instruction set
//     hamming_nearest.h     the k nearest of one query while codes go by
//     hamming_sliced.h      many queries against many codes: addition on bit planes
//     hamming_cube.h        codes of 8 and 16 bits: the answer for every possible query
//     hamming_targets.h     the two above, compiled for each instruction set
//
// The best set the machine has is chosen at run time; RAGSR_CPU=portable|neon|avx2|avx512 forces one. Whatever is
// chosen, however the work is cut up, the answer is the same: the k smallest in the order (distance, index).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "hamming_targets.h"

namespace ragsr {

using ScanKernel = void (*)(const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n, int64_t width,
                            int64_t first, Nearest* nearest);
using CubeKernel = void (*)(uint32_t* table, int64_t cells, int64_t k, int pass, int64_t part, int64_t parts);

struct CpuKernel {
  const char* name;
  DistanceKernel distances;
  ScanKernel scan;
  CubeKernel cube_pass;
  int64_t cells;  // of a vector of the cube
};

// What this machine can run, best last.
inline std::vector<CpuKernel> available_kernels() {
  std::vector<CpuKernel> kernels{
      {"portable", distances_portable, portable::scan, portable::cube_pass, portable::kCells}};
#ifdef RAGSR_NEON
  kernels.push_back({"neon", distances_neon, portable::scan, portable::cube_pass, portable::kCells});
#endif
#ifdef RAGSR_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"))
    kernels.push_back({"avx2", distances_avx2, avx2::scan, avx2::cube_pass, avx2::kCells});
  if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    kernels.push_back({"avx512", distances_avx512, avx512::scan, avx512::cube_pass, avx512::kCells});
#endif
  return kernels;
}

// The best kernel of this machine, or the one RAGSR_CPU names. Throws std::runtime_error for one it has not.
inline CpuKernel choose_kernel() {
  const std::vector<CpuKernel> kernels = available_kernels();
  const char* wanted = std::getenv("RAGSR_CPU");
  if (wanted == nullptr || *wanted == '\0') return kernels.back();
  std::string names;
  for (const CpuKernel& kernel : kernels) {
    if (std::strcmp(kernel.name, wanted) == 0) return kernel;
    names += std::string(names.empty() ? "" : ", ") + kernel.name;
  }
  throw std::runtime_error("RAGSR_CPU is '" + std::string(wanted) + "', but this machine has: " + names);
}

// ---------------------------------------------------------------- one answer

// Where the k nearest of each query go: distance and index [q, k].
struct Answer {
  int32_t* distance;
  int64_t* index;
  int64_t k;

  void write(int64_t row, const uint64_t* keys) const {
    for (int64_t j = 0; j < k; ++j) {
      distance[row * k + j] = key_distance(keys[j]);
      index[row * k + j] = key_index(keys[j]);
    }
  }
};

// ---------------------------------------------------------------- scan

// How q queries x n codes are cut into tasks: groups of queries times parts of the codes.
struct ScanPlan {
  int64_t rows;      // queries of a group
  int64_t groups;
  int64_t length;    // codes of a part
  int64_t parts;
  bool counting;     // k is no small share of the codes: count distances instead of keeping a list

  int64_t kept() const { return k < length ? k : length; }  // keys of one query from one part
  int64_t k;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Large groups share the tables of a block among many queries; parts are made when the groups do not occupy the
// threads. Parts are whole blocks of 512 codes, and long: each begins with a bound that is still wide.
inline ScanPlan plan_scan(int64_t q, int64_t n, int64_t k, int64_t threads) {
  constexpr int64_t kGroup = 128, kBlock = 512, kSmallestPart = 1 << 15, kKeys = 1 << 21;
  ScanPlan plan{};
  plan.k = k;
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

// ---------------------------------------------------------------- cube

inline int64_t power_of_two_from(int64_t k) {
  int64_t power = 1;
  while (power < k) power *= 2;
  return power;
}

// Both times in nanoseconds of one thread, measured on Zen 4 with AVX-512; only their order matters. Lists of more than
// 16 entries leave the registers.
inline bool cube_pays(int64_t q, int64_t n, int64_t width, int64_t k) {
  if (width > 2 || k > kCubeLargestK || n >= int64_t{1} << kCubeIndexBits) return false;
  const auto entries = static_cast<double>((int64_t{1} << 8 * width) * power_of_two_from(k));
  const auto kept = static_cast<double>(k), codes = static_cast<double>(n);
  const double build = 1000 + codes + entries * static_cast<double>(8 * width) * (k <= 16 ? 0.11 : 0.8);
  const double scan = 100 + 0.01 * codes + 18 * kept * (1 + std::log(codes / kept));
  return build < static_cast<double>(q) * scan;
}

// The first k codes of every cell, in the order of their index.
inline void insert_codes(uint32_t* table, const CpuKernel& kernel, const uint8_t* codes, int64_t n, int64_t width,
                         int64_t k) {
  std::vector<uint8_t> filled(size_t{1} << 8 * width);
  for (int64_t i = 0; i < n; ++i) {
    const auto cell = static_cast<int64_t>(width == 1 ? codes[i] : load_as<uint16_t>(codes + 2 * i));
    uint8_t& entries = filled[static_cast<size_t>(cell)];
    if (entries == k) continue;
    const int64_t list = cell / kernel.cells * k + entries++;
    table[list * kernel.cells + cell % kernel.cells] = static_cast<uint32_t>(i);
  }
}

template <class Parallel>
void cube_topk(const CpuKernel& kernel, const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n,
               int64_t width, const Answer& answer, const Parallel& parallel) {
  constexpr int64_t kParts = 16, kRows = 4096;
  constexpr uint32_t kNobody = uint32_t{17} << kCubeIndexBits;  // further away than any code
  const int64_t cells = int64_t{1} << 8 * width, k = power_of_two_from(answer.k);
  std::vector<uint32_t> room(static_cast<size_t>(cells * k + 16), kNobody);
  struct alignas(64) Line { uint32_t entry[16]; };
  uint32_t* table = aligned<Line>(room.data())->entry;
  insert_codes(table, kernel, codes, n, width, k);
  const int64_t passes = divide_up(log2_of(cells / kernel.cells), cube_pass_bits(k));
  for (int pass = 0; pass < passes; ++pass)
    parallel(kParts, [&](int64_t part) { kernel.cube_pass(table, cells, k, pass, part, kParts); });
  parallel(divide_up(q, kRows), [&](int64_t task) {
    constexpr uint32_t kIndex = (uint32_t{1} << kCubeIndexBits) - 1;
    for (int64_t i = task * kRows; i < std::min(q, (task + 1) * kRows); ++i) {
      const auto cell = static_cast<int64_t>(width == 1 ? queries[i] : load_as<uint16_t>(queries + 2 * i));
      const uint32_t* list = table + cell / kernel.cells * k * kernel.cells + cell % kernel.cells;
      for (int64_t j = 0; j < answer.k; ++j) {
        const uint32_t entry = list[j * kernel.cells];
        answer.distance[i * answer.k + j] = static_cast<int32_t>(entry >> kCubeIndexBits);
        answer.index[i * answer.k + j] = entry & kIndex;
      }
    }
  });
}

// ---------------------------------------------------------------- the k nearest

// distance, index [q, k] from queries [q, width] and codes [n, width], 1 <= k <= n.
// `parallel(tasks, body)` calls body(task) for every task and returns when all are done, on up to `threads` threads.
template <class Parallel>
void hamming_topk(const CpuKernel& kernel, const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n,
                  int64_t width, int64_t k, int32_t* distance, int64_t* index, int64_t threads, Parallel parallel) {
  if (q == 0) return;
  const Answer answer{distance, index, k};
  if (cube_pays(q, n, width, k)) return cube_topk(kernel, queries, q, codes, n, width, answer, parallel);
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
