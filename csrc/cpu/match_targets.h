// The inner loops of the correlation search (match_kernels.h) for each instruction set:
//
//     portable    128-bit vectors: SSE2 on every x86-64, NEON on every arm64
//     avx2        256 bits and fused multiply-add
//     avx512      512 bits: a tile of 12 x 32 numbers stays in registers
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "instruction_sets.h"

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

#ifdef RAGSR_X86

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

template <class T>
SearchKernel<T> choose_search_kernel() {
  std::vector<SearchKernel<T>> kernels{match_portable::search_kernel<T>("portable")};
#ifdef RAGSR_X86
  kernels.push_back(match_avx2::search_kernel<T>("avx2"));
  kernels.push_back(match_avx512::search_kernel<T>("avx512"));
#endif
  return choose(kernels);
}

}  // namespace ragsr
