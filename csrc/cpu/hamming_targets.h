// The scan and the cube for each instruction set. hamming_sliced.h and hamming_cube.h are written once, in terms of a
// vector `Words` and the few operations defined here, and compiled in a namespace of its own for every set: a function
// may use an instruction only if it is marked for it, and only functions marked alike are inlined into one another.
//
//     portable    128-bit vectors: SSE2 on every x86-64, NEON on every arm64, words elsewhere
//     avx2        256 bits
//     avx512      512 bits and VPTERNLOG, any function of three inputs in one instruction
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hamming_distances.h"
#include "hamming_nearest.h"

namespace ragsr {

constexpr int kCubeIndexBits = 27;
constexpr int64_t kCubeLargestK = 128;

// Bits of the vector number that a pass over the cube does: its tiles of k << bits vectors stay in the first cache.
constexpr int cube_pass_bits(int64_t k) { return k <= 4 ? 4 : 2; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int log2_of(int64_t n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// The first address for a T in a room that has sizeof(T) bytes to spare.
template <class T>
T* aligned(void* room) {
  const auto address = (reinterpret_cast<uintptr_t>(room) + sizeof(T) - 1) / sizeof(T) * sizeof(T);
  return reinterpret_cast<T*>(address);
}

namespace portable {

#define RAGSR_TARGET
using Words = uint64_t __attribute__((vector_size(16)));
constexpr int64_t kSlicedQueries = 24;  // from so many queries on, tables are worth their while

inline Words broadcast(uint64_t x) { return Words{x, x}; }
inline Words majority(Words a, Words b, Words c) { return (a & b) | (c & (a ^ b)); }
inline Words parity(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words choose(Words mask, Words a, Words b) { return (a & mask) | (b & ~mask); }
inline bool all_set(Words x) { return (x[0] & x[1]) == ~uint64_t{0}; }

inline bool split_block(const uint8_t*, int64_t, Words*, int64_t) { return false; }

using Cells = uint32_t __attribute__((vector_size(16)));
inline Cells smaller(Cells a, Cells b) { return a < b ? a : b; }
inline Cells larger(Cells a, Cells b) { return a < b ? b : a; }
template <int Bit>
inline Cells across(Cells x) {
  return Bit == 0 ? Cells{x[1], x[0], x[3], x[2]} : Cells{x[2], x[3], x[0], x[1]};
}

#ifdef RAGSR_NEON
constexpr DistanceKernel distances = distances_neon;
#else
constexpr DistanceKernel distances = distances_portable;
#endif

#include "hamming_cube.h"
#include "hamming_sliced.h"
#undef RAGSR_TARGET

}  // namespace portable

#ifdef RAGSR_X86

namespace avx2 {

#define RAGSR_TARGET RAGSR_AVX2
using Words = uint64_t __attribute__((vector_size(32)));
constexpr int64_t kSlicedQueries = 12;

RAGSR_TARGET inline Words broadcast(uint64_t x) { return (Words)_mm256_set1_epi64x(static_cast<long long>(x)); }
RAGSR_TARGET inline Words majority(Words a, Words b, Words c) { return (a & b) | (c & (a ^ b)); }
RAGSR_TARGET inline Words parity(Words a, Words b, Words c) { return a ^ b ^ c; }
RAGSR_TARGET inline Words choose(Words mask, Words a, Words b) { return (a & mask) | (b & ~mask); }
RAGSR_TARGET inline bool all_set(Words x) { return _mm256_testc_si256((__m256i)x, _mm256_set1_epi8(-1)); }

RAGSR_TARGET inline bool split_block(const uint8_t*, int64_t, Words*, int64_t) { return false; }

using Cells = uint32_t __attribute__((vector_size(32)));
RAGSR_TARGET inline Cells smaller(Cells a, Cells b) { return a < b ? a : b; }
RAGSR_TARGET inline Cells larger(Cells a, Cells b) { return a < b ? b : a; }
template <int Bit>
RAGSR_TARGET inline Cells across(Cells x) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Cells)_mm256_permutevar8x32_epi32((__m256i)x, _mm256_xor_si256(lane, _mm256_set1_epi32(1 << Bit)));
}

constexpr DistanceKernel distances = distances_avx2;

#include "hamming_cube.h"
#include "hamming_sliced.h"
#undef RAGSR_TARGET

}  // namespace avx2

namespace avx512 {

#define RAGSR_TARGET RAGSR_AVX512
using Words = uint64_t __attribute__((vector_size(64)));
constexpr int64_t kSlicedQueries = 12;

RAGSR_TARGET inline Words broadcast(uint64_t x) { return (Words)_mm512_set1_epi64(static_cast<long long>(x)); }
RAGSR_TARGET inline Words majority(Words a, Words b, Words c) {
  return (Words)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0xe8);
}
RAGSR_TARGET inline Words parity(Words a, Words b, Words c) {
  return (Words)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
RAGSR_TARGET inline Words choose(Words mask, Words a, Words b) {
  return (Words)_mm512_ternarylogic_epi64((__m512i)mask, (__m512i)a, (__m512i)b, 0xca);
}
RAGSR_TARGET inline bool all_set(Words x) {
  return _mm512_cmpneq_epi64_mask((__m512i)x, _mm512_set1_epi64(-1)) == 0;
}

// A whole block of codes of 32 bytes, taken apart: word c of code i to lane i % 8 of item[c * stride + i / 8]. False for
// other widths, which are copied word by word.
RAGSR_TARGET inline bool split_block(const uint8_t* codes, int64_t width, Words* item, int64_t stride) {
  if (width != 32) return false;
  const __m512i first = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13), last = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t v = 0; v < 64; ++v, codes += 256) {
    const __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64);
    const __m512i c = _mm512_loadu_si512(codes + 128), d = _mm512_loadu_si512(codes + 192);
    const __m512i low = _mm512_permutex2var_epi64(a, first, b), low2 = _mm512_permutex2var_epi64(c, first, d);
    const __m512i high = _mm512_permutex2var_epi64(a, last, b), high2 = _mm512_permutex2var_epi64(c, last, d);
    item[v] = (Words)_mm512_shuffle_i64x2(low, low2, 0x44);
    item[stride + v] = (Words)_mm512_shuffle_i64x2(low, low2, 0xee);
    item[2 * stride + v] = (Words)_mm512_shuffle_i64x2(high, high2, 0x44);
    item[3 * stride + v] = (Words)_mm512_shuffle_i64x2(high, high2, 0xee);
  }
  return true;
}

using Cells = uint32_t __attribute__((vector_size(64)));
RAGSR_TARGET inline Cells smaller(Cells a, Cells b) { return a < b ? a : b; }
RAGSR_TARGET inline Cells larger(Cells a, Cells b) { return a < b ? b : a; }
template <int Bit>
RAGSR_TARGET inline Cells across(Cells x) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return (Cells)_mm512_permutexvar_epi32(_mm512_xor_si512(lane, _mm512_set1_epi32(1 << Bit)), (__m512i)x);
}

constexpr DistanceKernel distances = distances_avx512;

#include "hamming_cube.h"
#include "hamming_sliced.h"
#undef RAGSR_TARGET

}  // namespace avx512

#endif  // RAGSR_X86

}  // namespace ragsr
