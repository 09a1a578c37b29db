// Rows of 16-bit floats to float and back. Processors convert eight float16 at once, but compilers write that only for
// code that may not run elsewhere: hence by hand, where the machine has it. Free of torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "instruction_sets.h"

#ifdef RAGSR_X86
#define RAGSR_F16C __attribute__((target("avx,f16c")))
#endif

namespace ragsr {

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline constexpr bool is_float16 = false;  // matrices.h says which type is

#ifdef RAGSR_X86

inline bool has_f16c() {
  static const bool has = contains(machine_sets(), "avx2");
  return has;
}

// Both convert whole groups of eight and return how many elements that were.
RAGSR_F16C inline int64_t widen_eights(const char* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
  return i;
}

RAGSR_F16C inline int64_t narrow_eights(const float* from, char* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return i;
}

#else

inline bool has_f16c() { return false; }
inline int64_t widen_eights(const char*, float*, int64_t) { return 0; }
inline int64_t narrow_eights(const float*, char*, int64_t) { return 0; }

#endif

template <class T>
void widen(const T* from, int64_t step, int64_t n, Wide<T>* to) {
  int64_t i = 0;
  if constexpr (is_float16<T>)
    if (step == 1 && has_f16c()) i = widen_eights(reinterpret_cast<const char*>(from), to, n);
  if (step == 1) {
    for (; i < n; ++i) to[i] = static_cast<Wide<T>>(from[i]);
  } else {
    for (; i < n; ++i) to[i] = static_cast<Wide<T>>(from[i * step]);
  }
}

template <class T>
void narrow(const Wide<T>* from, int64_t n, T* to, int64_t step) {
  int64_t i = 0;
  if constexpr (is_float16<T>)
    if (step == 1 && has_f16c()) i = narrow_eights(from, reinterpret_cast<char*>(to), n);
  if (step == 1) {
    for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (; i < n; ++i) to[i * step] = static_cast<T>(from[i]);
  }
}

}  // namespace ragsr
