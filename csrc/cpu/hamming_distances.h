// Distances of one query to a row of codes, written for each instruction set: what a few queries are scanned with (one
// pass over the codes is then as fast as memory) and what hamming_distance returns.
#pragma once

#include <cstdint>
#include <cstring>

#include "instruction_sets.h"

#ifdef RAGSR_X86
#define RAGSR_AVX2 __attribute__((target("avx2,popcnt")))
#define RAGSR_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512bitalg,avx2,popcnt")))
#endif

namespace ragsr {

// distances of `query` [width] to codes [n, width], row after row
using DistanceKernel = void (*)(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width, uint16_t* out);

template <class T>
inline uint64_t load_as(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// `bytes` (1 to 8) bytes as the low end of a word, without reading beside them: two loads that may overlap.
inline uint64_t load_word(const uint8_t* from, int64_t bytes) {
  if (bytes == 8) return load_as<uint64_t>(from);
  if (bytes >= 4) return load_as<uint32_t>(from) | load_as<uint32_t>(from + bytes - 4) << (8 * (bytes - 4));
  if (bytes >= 2) return load_as<uint16_t>(from) | load_as<uint16_t>(from + bytes - 2) << (8 * (bytes - 2));
  return *from;
}

inline int popcount_words(const uint8_t* a, const uint8_t* b, int64_t width) {
  int count = 0;
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) count += __builtin_popcountll(load_as<uint64_t>(a + i) ^ load_as<uint64_t>(b + i));
  if (i < width) count += __builtin_popcountll(load_word(a + i, width - i) ^ load_word(b + i, width - i));
  return count;
}

inline void distances_portable(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(popcount_words(query, codes + i * width, width));
}

#ifdef RAGSR_NEON

// CNT counts the bits of each byte; ADDLV adds the bytes of a vector.
inline void distances_neon(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* code = codes + i * width;
    int64_t j = 0;
    uint16x8_t sum = vdupq_n_u16(0);
    for (; j + 16 <= width; j += 16)
      sum = vpadalq_u8(sum, vcntq_u8(veorq_u8(vld1q_u8(query + j), vld1q_u8(code + j))));
    out[i] = static_cast<uint16_t>(vaddvq_u16(sum) + popcount_words(query + j, code + j, width - j));
  }
}

#endif  // RAGSR_NEON

#ifdef RAGSR_X86

// Set bits of each 64-bit lane: look both nibbles of every byte up, then add the bytes of the lane.
RAGSR_AVX2 inline __m256i popcount_lanes(__m256i x) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
  const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
  return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
}

RAGSR_AVX2 inline void distances_avx2(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width,
                                      uint16_t* out) {
  if (width < 32) {  // the scalar POPCNT is faster than a vector that is mostly empty
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(popcount_words(query, codes + i * width, width));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* code = codes + i * width;
    int64_t j = 0;
    __m256i sum = _mm256_setzero_si256();
    for (; j + 32 <= width; j += 32) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + j));
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + j));
      sum = _mm256_add_epi64(sum, popcount_lanes(_mm256_xor_si256(c, q)));
    }
    alignas(32) uint64_t part[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), sum);
    const int tail = popcount_words(query + j, code + j, width - j);
    out[i] = static_cast<uint16_t>(part[0] + part[1] + part[2] + part[3] + tail);
  }
}

// Codes of 1, 2, 4 or 8 bytes fill a vector: `Count` bits of every element, then each count widened to 16 bits.
RAGSR_AVX512 inline void distances_avx512_1(uint8_t query, const uint8_t* codes, int64_t n, uint16_t* out) {
  const __m256i q = _mm256_set1_epi8(static_cast<char>(query));
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 some = n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
    const __m256i c = _mm256_maskz_loadu_epi8(some, codes + i);
    _mm512_mask_storeu_epi16(out + i, some, _mm512_cvtepu8_epi16(_mm256_popcnt_epi8(_mm256_xor_si256(c, q))));
  }
}

RAGSR_AVX512 inline void distances_avx512_2(uint16_t query, const uint8_t* codes, int64_t n, uint16_t* out) {
  const __m512i q = _mm512_set1_epi16(static_cast<short>(query));
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 some = n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
    const __m512i c = _mm512_maskz_loadu_epi16(some, codes + 2 * i);
    _mm512_mask_storeu_epi16(out + i, some, _mm512_popcnt_epi16(_mm512_xor_si512(c, q)));
  }
}

RAGSR_AVX512 inline void distances_avx512_4(uint32_t query, const uint8_t* codes, int64_t n, uint16_t* out) {
  const __m512i q = _mm512_set1_epi32(static_cast<int>(query));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const __m512i c = _mm512_maskz_loadu_epi32(some, codes + 4 * i);
    _mm512_mask_cvtepi32_storeu_epi16(out + i, some, _mm512_popcnt_epi32(_mm512_xor_si512(c, q)));
  }
}

RAGSR_AVX512 inline void distances_avx512_8(uint64_t query, const uint8_t* codes, int64_t n, uint16_t* out) {
  const __m512i q = _mm512_set1_epi64(static_cast<long long>(query));
  for (int64_t i = 0; i < n; i += 8) {
    const __mmask8 some = static_cast<__mmask8>(n - i >= 8 ? 0xff : (1u << (n - i)) - 1);
    const __m512i c = _mm512_maskz_loadu_epi64(some, codes + 8 * i);
    _mm512_mask_cvtepi64_storeu_epi16(out + i, some, _mm512_popcnt_epi64(_mm512_xor_si512(c, q)));
  }
}

// Differing bits of one code, spread over eight lanes.
RAGSR_AVX512 inline __m512i counts_avx512(const uint8_t* query, const uint8_t* code, int64_t width) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t j = 0; j < width; j += 64) {
    const __mmask64 bytes = width - j >= 64 ? ~__mmask64{0} : (__mmask64{1} << (width - j)) - 1;
    const __m512i q = _mm512_maskz_loadu_epi8(bytes, query + j), c = _mm512_maskz_loadu_epi8(bytes, code + j);
    sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(c, q)));
  }
  return sum;
}

// Lane sums of two vectors, pair by pair: (a0+a1, b0+b1, a2+a3, b2+b3, ...).
RAGSR_AVX512 inline __m512i add_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// The lanes of eight vectors summed, one result per lane, in order.
RAGSR_AVX512 inline __m512i add_across(const __m512i* x) {
  const __m512i a = add_pairs(x[0], x[1]), b = add_pairs(x[2], x[3]);
  const __m512i c = add_pairs(x[4], x[5]), d = add_pairs(x[6], x[7]);
  // a 128-bit quarter of `a` holds parts of codes 0 and 1: add its four quarters, beside those of b, c, d
  const __m512i ab = _mm512_add_epi64(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
  const __m512i cd = _mm512_add_epi64(_mm512_shuffle_i64x2(c, d, 0x88), _mm512_shuffle_i64x2(c, d, 0xdd));
  return _mm512_add_epi64(_mm512_shuffle_i64x2(ab, cd, 0x88), _mm512_shuffle_i64x2(ab, cd, 0xdd));
}

// Codes of 16 and 32 bytes: four and two of them in a vector, eight at a time.
RAGSR_AVX512 inline __m512i differing(const uint8_t* code, __m512i query) {
  return _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_loadu_si512(code), query));
}

RAGSR_AVX512 inline void distances_avx512_16(const uint8_t* query, const uint8_t* codes, int64_t n, uint16_t* out) {
  const __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(query)));
  const __m128i order = _mm_setr_epi16(0x0100, 0x0504, 0x0908, 0x0d0c, 0x0302, 0x0706, 0x0b0a, 0x0f0e);
  for (int64_t i = 0; i < n; i += 8, codes += 128) {  // codes 0 4 1 5 2 6 3 7
    const __m512i sums = add_pairs(differing(codes, q), differing(codes + 64, q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_shuffle_epi8(_mm512_cvtepi64_epi16(sums), order));
  }
}

RAGSR_AVX512 inline void distances_avx512_32(const uint8_t* query, const uint8_t* codes, int64_t n, uint16_t* out) {
  const __m512i q = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(query)));
  const __m128i order = _mm_setr_epi16(0x0100, 0x0504, 0x0302, 0x0706, 0x0908, 0x0d0c, 0x0b0a, 0x0f0e);
  for (int64_t i = 0; i < n; i += 8, codes += 256) {
    const __m512i low = add_pairs(differing(codes, q), differing(codes + 64, q));
    const __m512i high = add_pairs(differing(codes + 128, q), differing(codes + 192, q));
    const __m512i sums =  // codes 0 2 1 3 4 6 5 7
        _mm512_add_epi64(_mm512_shuffle_i64x2(low, high, 0x88), _mm512_shuffle_i64x2(low, high, 0xdd));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_shuffle_epi8(_mm512_cvtepi64_epi16(sums), order));
  }
}

RAGSR_AVX512 inline void distances_avx512(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width,
                                          uint16_t* out) {
  if (width == 1) return distances_avx512_1(*query, codes, n, out);
  if (width == 2) return distances_avx512_2(static_cast<uint16_t>(load_word(query, 2)), codes, n, out);
  if (width == 4) return distances_avx512_4(static_cast<uint32_t>(load_word(query, 4)), codes, n, out);
  if (width == 8) return distances_avx512_8(load_word(query, 8), codes, n, out);
  int64_t i = 0;
  if (width == 16 || width == 32) {
    i = n / 8 * 8;
    (width == 16 ? distances_avx512_16 : distances_avx512_32)(query, codes, i, out);
  }
  for (; width > 16 && i + 8 <= n; i += 8) {
    __m512i counts[8];
    for (int j = 0; j < 8; ++j) counts[j] = counts_avx512(query, codes + (i + j) * width, width);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi64_epi16(add_across(counts)));
  }
  for (; i < n; ++i) out[i] = static_cast<uint16_t>(popcount_words(query, codes + i * width, width));
}

#endif  // RAGSR_X86

}  // namespace ragsr
