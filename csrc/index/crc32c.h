// CRC-32C (Castagnoli): polynomial 0x1EDC6F41, reflected, start and end inverted; of "123456789" it is 0xE3069283.
// `crc32c(crc32c(0, a), b)` is that of a followed by b.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
#endif

namespace ragsr {

inline uint32_t crc32c_portable(uint32_t crc, const uint8_t* data, int64_t bytes) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t rest = i;
      for (int bit = 0; bit < 8; ++bit) rest = rest >> 1 ^ (rest & 1 ? 0x82F63B78u : 0u);
      made[i] = rest;
    }
    return made;
  }();
  crc = ~crc;
  for (int64_t i = 0; i < bytes; ++i) crc = crc >> 8 ^ table[(crc ^ data[i]) & 0xff];
  return ~crc;
}

#if defined(__x86_64__) && defined(__GNUC__)

__attribute__((target("sse4.2"))) inline uint32_t crc32c_sse42(uint32_t crc, const uint8_t* data, int64_t bytes) {
  uint64_t state = static_cast<uint32_t>(~crc);
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    state = _mm_crc32_u64(state, word);
  }
  uint32_t rest = static_cast<uint32_t>(state);
  for (; i < bytes; ++i) rest = _mm_crc32_u8(rest, data[i]);
  return ~rest;
}

inline uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t bytes) {
  static const bool fast = __builtin_cpu_supports("sse4.2");
  return fast ? crc32c_sse42(crc, data, bytes) : crc32c_portable(crc, data, bytes);
}

#else

inline uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t bytes) { return crc32c_portable(crc, data, bytes); }

#endif

}  // namespace ragsr
