// The inner loops of the correlation search (match_kernels.h) for each instruction set:
//
//     portable    128-bit vectors: SSE2 on every x86-64, NEON on every arm64
//     avx2        256 bits and fused multiply-add
//     avx512      512 bits: a tile of 12 x 32 numbers stays in registers
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace ragsr {

// How the two operands of a multiplication lie in memory. Pixels of a go in tiles of `tall` and then of `few` rows,
// [tile][channel][row]; pixels of b in panels of two vectors of `lanes`, the last perhaps of one, [panel][channel][lane].
struct Layout {
  int64_t lanes, tall, few;

  int64_t padded_rows(int64_t rows) const {
    const int64_t rest = rows % tall;
    return rows - rest + (rest + few - 1) / few * few;
  }
  int64_t padded_columns(int64_t columns) const { return (columns + lanes - 1) / lanes * lanes; }
};

template <class T>
struct SearchKernel {
  const char* name;
  Layout layout;
  void (*multiply)(const T* a, int64_t rows, const T* b, int64_t vectors, int64_t depth, T* out, int64_t stride);
  void (*add_diagonals)(const T* g, int64_t stride, int64_t patch, int64_t rows, int64_t columns, T* out,
                        int64_t out_stride);
  T (*score_row)(const T* const* sums, int64_t offset, int64_t patch, const T* scale, int64_t columns, T* scores);
  void (*score_neighbours)(const T* a, const T* b, int64_t row, int64_t channels, int64_t patch, int64_t run,
                           const T* scale, int64_t count, T* scores);
};

namespace match_portable {
#define RAGSR_TARGET
constexpr int64_t kBytes = 16;
constexpr int kTall = 4, kShort = 4;
#include "match_kernels.h"
#undef RAGSR_TARGET
}  // namespace match_portable

#if defined(__x86_64__) && defined(__GNUC__)

namespace match_avx2 {
#define RAGSR_TARGET __attribute__((target("avx2,fma")))
constexpr int64_t kBytes = 32;
constexpr int kTall = 6, kShort = 2;
#include "match_kernels.h"
#undef RAGSR_TARGET
}  // namespace match_avx2

namespace match_avx512 {
#define RAGSR_TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
constexpr int64_t kBytes = 64;
constexpr int kTall = 12, kShort = 4;
#include "match_kernels.h"
#undef RAGSR_TARGET
}  // namespace match_avx512

#endif

// What this machine can run, best last.
template <class T>
std::vector<SearchKernel<T>> available_search_kernels() {
  std::vector<SearchKernel<T>> kernels{match_portable::search_kernel<T>("portable")};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    kernels.push_back(match_avx2::search_kernel<T>("avx2"));
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
    kernels.push_back(match_avx512::search_kernel<T>("avx512"));
#endif
  return kernels;
}

// The best of this machine, but no better than RAGSR_CPU names (its spelling is checked where Hamming kernels are
// chosen; "neon" is portable here: the vectors of 128 bits are NEON's).
template <class T>
SearchKernel<T> choose_search_kernel() {
  const std::vector<SearchKernel<T>> kernels = available_search_kernels<T>();
  const char* wanted = std::getenv("RAGSR_CPU");
  if (wanted == nullptr || *wanted == '\0') return kernels.back();
  for (const SearchKernel<T>& kernel : kernels)
    if (std::strcmp(kernel.name, wanted) == 0) return kernel;
  return kernels.front();
}

}  // namespace ragsr
