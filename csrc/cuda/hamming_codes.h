// Codes in registers, and the key that holds the order (distance, index).
#pragma once

#include "device.h"

namespace ragsr {

constexpr int kThreads = 256;
constexpr int kBlocksAtOnce = 2;  // of a processor, at least: up to 128 registers for a thread
constexpr int kMaxBytes = 128;
constexpr int kBins = 8 * kMaxBytes + 1;  // distances from 0 to 1024

// key = distance << 48 | index, as on the CPU (csrc/cpu/hamming_nearest.h)
constexpr int kIndexBits = 48;
constexpr uint64_t kNoKey = ~uint64_t{0};

__host__ __device__ inline uint64_t key_of(int64_t distance, int64_t index) {
  return static_cast<uint64_t>(distance) << kIndexBits | static_cast<uint64_t>(index);
}
__host__ __device__ inline int32_t distance_of(uint64_t key) { return static_cast<int32_t>(key >> kIndexBits); }
__host__ __device__ inline int64_t index_of(uint64_t key) {
  return static_cast<int64_t>(key & ((uint64_t{1} << kIndexBits) - 1));
}

// Rows of `width` bytes, end to end. `step`: rows may be read in pieces of 16, 8, 4 or 1 bytes.
struct Codes {
  const uint8_t* data;
  int width;
  int step;
  __host__ __device__ const uint8_t* row(int64_t i) const { return data + i * width; }
};

// The largest step that neither the address nor the width gets in the way of.
inline Codes codes_at(const uint8_t* data, int64_t width) {
  const auto bits = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(width);
  const int step = bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 1;
  return {data, static_cast<int>(width), step};
}

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};

// Word w of row i; what lies behind the row is 0.
__device__ inline uint32_t load_word(const Codes& codes, int64_t i, int w) {
  const uint8_t* row = codes.row(i);
  if (codes.step >= 4) return 4 * w < codes.width ? reinterpret_cast<const uint32_t*>(row)[w] : 0;
  uint32_t word = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b)
    if (4 * w + b < codes.width) word |= static_cast<uint32_t>(row[4 * w + b]) << (8 * b);
  return word;
}

// Words [first, first + kWords) of row i, in vectors where that is possible. Zeros behind the row add nothing to a
// distance.
template <int kWords>
__device__ inline void load_words(const Codes& codes, int64_t i, int first, uint32_t (&to)[kWords]) {
  constexpr int kPiece = kWords < 4 ? kWords : 4;
  if (codes.step < 4 * kPiece || 4 * (first + kWords) > codes.width) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) to[w] = load_word(codes, i, first + w);
    return;
  }
  const auto* pieces = reinterpret_cast<const Words<kPiece>*>(codes.row(i) + 4 * first);
#pragma unroll
  for (int p = 0; p < kWords / kPiece; ++p) {
    const Words<kPiece> piece = pieces[p];
#pragma unroll
    for (int w = 0; w < kPiece; ++w) to[p * kPiece + w] = piece.word[w];
  }
}

// Distances of row i to queries [kQueries, kWords]; long codes pass through eight registers.
template <int kWords, int kQueries>
__device__ inline void distances_to(const Codes& codes, int64_t i, const Words<kWords>* queries,
                                    int (&distance)[kQueries]) {
  constexpr int kAtOnce = kWords < 8 ? kWords : 8;
#pragma unroll
  for (int g = 0; g < kQueries; ++g) distance[g] = 0;
#pragma unroll 1
  for (int first = 0; first < kWords; first += kAtOnce) {
    uint32_t code[kAtOnce];
    load_words(codes, i, first, code);
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
#pragma unroll
      for (int w = 0; w < kAtOnce; ++w) distance[g] += __popc(code[w] ^ queries[g].word[first + w]);
    }
  }
}

// Calls f with the number of registers that a code of `width` bytes takes, as a type: a power of two up to 32.
template <int kWords>
struct Size {
  static constexpr int value = kWords;
};
template <class F>
void with_words(int64_t width, const F& f) {
  if (width <= 4) return f(Size<1>{});
  if (width <= 8) return f(Size<2>{});
  if (width <= 16) return f(Size<4>{});
  if (width <= 32) return f(Size<8>{});
  if (width <= 64) return f(Size<16>{});
  return f(Size<32>{});
}

// Where the answer goes: distance and index [q, k].
struct Answer {
  int32_t* distance;
  int64_t* index;
  __device__ void write(int64_t place, uint64_t key) const {
    distance[place] = distance_of(key);
    index[place] = index_of(key);
  }
};

}  // namespace ragsr
