// The scan for many queries on tensor cores: `mma.sync` multiplies 16 codes by 8 queries at once.
//
//     sm_80, 86, 89   single bits, popc(q ^ r): the distance itself
//     sm_90           single bits, of which only popc(q & r) is native; complements beside the codes give the distance:
//                         popc([q, ~q] & [~r, r]) = popc(q & ~r) + popc(~q & r) = popc(q ^ r)
//     later           single bits are emulated and slow; bytes 1 and -1 in place of the bits 1 and 0 give
//                         <q, r> = bits - 2 popc(q ^ r)
//
// Fragments of a 16 x 8 product over 256 bits (128 bits: the first half of each), lane = 4 * group + member:
//
//     codes      registers  word member of code group, of code group + 8, word member + 4 of both
//     queries    registers  word member, word member + 4 of query group
//     distances  registers  (code group, queries 2 * member and 2 * member + 1), the same of code group + 8
//
// Over 32 bytes the same holds for words of four bytes, made of a nibble of the code each.
//
// A tile is some rounds of 16 codes for each warp. Per query (two columns of each lane) only the least distance of a
// tile is kept; where it is below the bound the warp looks closer.
#pragma once

#include "hamming_scan.h"

namespace ragsr {

enum class Formulation { with_xor, with_and, with_bytes };

constexpr int kMmaCodes = 16 * kWarps;  // of a round

#ifdef __CUDACC__
#define RAGSR_MMA(shape, types)                                                                                 \
  asm volatile("mma.sync.aligned." shape ".row.col.s32." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define RAGSR_MMA_HALF(types)                                                                                       \
  asm volatile("mma.sync.aligned.m16n8k128.row.col.s32." types " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"     \
               : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(b[0]))

template <Formulation kHow>
__device__ inline void multiply(int (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kHow == Formulation::with_bytes)
    RAGSR_MMA("m16n8k32", "s8.s8.s32");
  else if constexpr (kHow == Formulation::with_and)
    RAGSR_MMA("m16n8k256", "b1.b1.s32.and.popc");
  else
    RAGSR_MMA("m16n8k256", "b1.b1.s32.xor.popc");
}

template <Formulation kHow>
__device__ inline void multiply(int (&sum)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  if constexpr (kHow == Formulation::with_and)
    RAGSR_MMA_HALF("b1.b1.s32.and.popc");
  else
    RAGSR_MMA_HALF("b1.b1.s32.xor.popc");
}
#undef RAGSR_MMA
#undef RAGSR_MMA_HALF
#endif

// Whether the code being compiled is for devices that multiply in this way; else the kernel is left empty.
template <Formulation kHow>
__host__ __device__ constexpr bool compiled_here() {
#if !defined(__CUDA_ARCH__)
  return true;
#elif __CUDA_ARCH__ < 900
  return kHow == Formulation::with_xor;
#elif __CUDA_ARCH__ < 1000
  return kHow == Formulation::with_and;
#else
  return kHow == Formulation::with_bytes;
#endif
}

// Four bits as four bytes: 1 for a set bit, -1 for the others.
__device__ inline uint32_t signs_of(uint32_t nibble) {
  const uint32_t bits = nibble * 0x00204081u & 0x01010101u;
  return ~(bits * 0xfeu);
}

template <int kWords, Formulation kHow>
struct Product {
  static constexpr bool kAnd = kHow == Formulation::with_and, kBytes = kHow == Formulation::with_bytes;
  static constexpr int kExtended = kBytes ? 8 * kWords : kAnd ? 2 * kWords : kWords;  // words that are multiplied
  static constexpr int kSteps = kExtended <= 4 ? 1 : kExtended / 8;
  static constexpr int kHalves = kExtended <= 4 ? 1 : 2;  // of a step
  static constexpr int kMost = kBytes ? 4 : 8;            // words of a code with which registers hold 64 queries
  static constexpr int kColumns = kWords <= kMost ? 8 : 8 * kMost / kWords;  // of 8 queries
  static constexpr int kQueries = 8 * kColumns;
  static constexpr int kRounds = kWords <= 4 ? 4 : kWords == 8 ? 2 : 1;  // of a tile; again for the registers

  // Word `at` of what is multiplied: codes are [~r, r], queries [q, ~q]; or nibble `at` as bytes.
  __device__ static uint32_t extended(const Codes& rows, int64_t i, int at, bool inverted_first) {
    if (at >= kExtended) return 0;
    if (kBytes) return signs_of(load_word(rows, i, at / 8) >> 4 * (at % 8) & 0xf);
    const uint32_t word = load_word(rows, i, at % kWords);
    return kAnd && (at < kWords) == inverted_first ? ~word : word;
  }

  struct CodeFragments {
    uint32_t word[kSteps][2 * kHalves];
  };
  struct QueryFragments {
    uint32_t word[kColumns][kSteps][kHalves];
  };

  // Codes first + group and first + group + 8; none beyond `last`.
  __device__ static void load(const Codes& codes, int64_t first, int64_t last, int lane, CodeFragments& to) {
    const int64_t low = smaller_of(first + lane / 4, last), high = smaller_of(first + lane / 4 + 8, last);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        to.word[s][2 * h] = extended(codes, low, 8 * s + 4 * h + lane % 4, true);
        to.word[s][2 * h + 1] = extended(codes, high, 8 * s + 4 * h + lane % 4, true);
      }
    }
  }

  __device__ static void load(const Codes& queries, int64_t first, int64_t last, int lane, QueryFragments& to) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t row = smaller_of(first + 8 * c + lane / 4, last);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) to.word[c][s][h] = extended(queries, row, 8 * s + 4 * h + lane % 4, false);
      }
    }
  }

  // The lane's four distances of 16 codes to the queries of column c.
  __device__ static void distances(const CodeFragments& codes, const QueryFragments& queries, int c, int (&sum)[4]) {
    sum[0] = sum[1] = sum[2] = sum[3] = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      multiply<kHow>(sum, codes.word[s], queries.word[c][s]);
    }
#pragma unroll
    for (int d = 0; d < 4 && kBytes; ++d) sum[d] = (32 * kWords - sum[d]) / 2;
  }
};

template <int kWords, Formulation kHow>
__global__ void __launch_bounds__(kThreads, 1) hamming_mma_kernel(Scan scan) {
  using Of = Product<kWords, kHow>;
  if constexpr (compiled_here<kHow>()) {
    constexpr int kQueries = Of::kQueries, kRounds = Of::kRounds;
    __shared__ int count[kQueries];
    __shared__ uint32_t worst[kQueries];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const Piece piece = Piece::of_block<kQueries>(scan);
    const Lists lists{scan, count, worst};
    if (thread < kQueries) lists.clear(thread, piece.row + thread < scan.q);
    typename Of::QueryFragments queries;
    Of::load(scan.queries, piece.row, scan.q - 1, lane, queries);
    __syncthreads();

    const auto query_of = [&](int c, int d) { return 8 * c + 2 * (lane % 4) + d % 2; };  // of distance d of column c
    int bound[Of::kColumns][2];
    const auto read_bounds = [&] {
#pragma unroll
      for (int c = 0; c < Of::kColumns; ++c)
        for (int d = 0; d < 2; ++d) bound[c][d] = lists.bound(query_of(c, d));
    };
    read_bounds();
    int64_t rows = smaller_of(enough_for(scan.k), kMmaCodes);  // of the tile
    for (int64_t tile = piece.begin; tile < piece.end; tile += rows, rows = kRounds * kMmaCodes) {
      const int64_t stop = smaller_of(piece.end, tile + rows), last = stop - 1;
      const auto code_of = [&](int r) { return tile + r * kMmaCodes + 16 * warp; };  // the first of round r
      int least[Of::kColumns][2];
#pragma unroll
      for (int c = 0; c < Of::kColumns; ++c) least[c][0] = least[c][1] = 8 * kMaxBytes;
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        typename Of::CodeFragments codes;
        Of::load(scan.codes, code_of(r), last, lane, codes);
#pragma unroll
        for (int c = 0; c < Of::kColumns; ++c) {
          int sum[4];
          Of::distances(codes, queries, c, sum);
          least[c][0] = min(least[c][0], min(sum[0], sum[2]));
          least[c][1] = min(least[c][1], min(sum[1], sum[3]));
        }
      }
      bool near = false;
#pragma unroll
      for (int c = 0; c < Of::kColumns; ++c) near |= least[c][0] < bound[c][0] || least[c][1] < bound[c][1];

      uint32_t pending[kRounds] = {};  // bit 4 * c + d: distance d of column c is below its bound
      if (__ballot_sync(kAllLanes, near) != 0) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          typename Of::CodeFragments codes;
          Of::load(scan.codes, code_of(r), last, lane, codes);
#pragma unroll
          for (int c = 0; c < Of::kColumns; ++c) {
            int sum[4];
            Of::distances(codes, queries, c, sum);
#pragma unroll
            for (int d = 0; d < 4; ++d) {
              const bool there = code_of(r) + lane / 4 + 8 * (d / 2) < stop;
              pending[r] |= static_cast<uint32_t>(there && sum[d] < bound[c][d % 2]) << (4 * c + d);
            }
          }
        }
      }
      const auto put_pending = [&] {
        bool full = false;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          for (uint32_t left = pending[r]; left != 0; left &= left - 1) {
            const int bit = __ffs(static_cast<int>(left)) - 1, g = query_of(bit / 4, bit % 4);
            const int64_t i = code_of(r) + lane / 4 + 8 * (bit % 4 / 2);
            uint32_t distance = 0;
            for (int w = 0; w < kWords; ++w)
              distance += __popc(load_word(scan.codes, i, w) ^ load_word(scan.queries, piece.row + g, w));
            const uint32_t key = distance << kPartBits | static_cast<uint32_t>(i - piece.begin);
            if (lists[g].put(key, full)) pending[r] &= ~(uint32_t{1} << bit);
          }
        }
        return full;
      };
      if (settle<kQueries>(lists, put_pending(), put_pending)) read_bounds();
    }
    write_lists<kQueries>(lists, piece);
  }
}

}  // namespace ragsr
