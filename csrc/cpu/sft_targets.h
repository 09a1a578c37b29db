// The rows of group_norm_sft for each instruction set: sft_rows.h is written once, in terms of a vector `Reals` and a few
// operations on it, and compiled in a namespace of its own for every set, as hamming_targets.h does.
//
//     exact       float64, for gradient checks and whoever computes in it
//     portable    4 lanes of float32: SSE2 on every x86-64, NEON on every arm64
//     avx2        8 lanes, FMA and F16C
//     avx512      16 lanes
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "instruction_sets.h"
#include "sft_row.h"

namespace ragsr::sft {

namespace exact {

#define RAGSR_TARGET
using Real = double;
using Reals = double __attribute__((vector_size(16)));
constexpr int64_t kLanes = 2;

inline Reals load(const double* from) { return Reals{from[0], from[1]}; }
inline void store(double* to, Reals x) { std::memcpy(to, &x, sizeof x); }
inline double real(double x) { return x; }
inline Reals exponential(Reals x) { return Reals{std::exp(x[0]), std::exp(x[1])}; }

#include "sft_rows.h"
#include "sft_steps.h"
#undef RAGSR_TARGET

}  // namespace exact

namespace portable {

#define RAGSR_TARGET
using Real = float;
using Reals = float __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4;

#include "sft_vectors.h"

#include "sft_rows.h"
#include "sft_steps.h"
#undef RAGSR_TARGET

}  // namespace portable

#ifdef RAGSR_X86
#define RAGSR_SHORTS_IN_HARDWARE

namespace avx2 {

#define RAGSR_TARGET __attribute__((target("avx2,fma,f16c")))
using Real = float;
using Reals = float __attribute__((vector_size(32)));
using Bits = uint32_t __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;

RAGSR_TARGET inline Reals load_half(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
RAGSR_TARGET inline void store_half(Half* to, Reals x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
RAGSR_TARGET inline Bits load_shorts(const void* from) {
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
RAGSR_TARGET inline void store_shorts(void* to, Bits x) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)x), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

#include "sft_vectors.h"

#include "sft_rows.h"
#include "sft_steps.h"
#undef RAGSR_TARGET

}  // namespace avx2

namespace avx512 {

#define RAGSR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
using Real = float;
using Reals = float __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

RAGSR_TARGET inline Reals load_half(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
RAGSR_TARGET inline void store_half(Half* to, Reals x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
RAGSR_TARGET inline Bits load_shorts(const void* from) {
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
RAGSR_TARGET inline void store_shorts(void* to, Bits x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)x));
}

#include "sft_vectors.h"

#include "sft_rows.h"
#include "sft_steps.h"
#undef RAGSR_TARGET

}  // namespace avx512

#undef RAGSR_SHORTS_IN_HARDWARE
#endif  // RAGSR_X86

}  // namespace ragsr::sft
