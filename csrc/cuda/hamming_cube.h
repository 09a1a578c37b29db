// Codes of 8 or 16 bits: the k nearest of every possible query at once (the idea: csrc/cpu/hamming_cube.h).
//
//     table[cell][K]   a sorted list for each of the 256 or 65,536 codes, K a power of two
//     insert           the first K codes of every cell, in the order of their index
//     bit after bit    list[c] = the K smallest of  list[c]  and  list[c ^ bit] + 1 bit further
//     look up          one list for each query
//
// A block holds 2^done cells that differ in `done` bits of their number, and does these bits in shared memory. With 512
// cells two launches do all sixteen bits: cells that lie side by side, then cells that lie 512 apart.
//
// An entry is distance << 27 | index, so that integers order as (distance, index).
#pragma once

#include "hamming_codes.h"

namespace ragsr {

constexpr int kCubeIndexBits = 27;
constexpr int kCubeLargestK = 128;
constexpr uint32_t kNobody = uint32_t{17} << kCubeIndexBits;  // further away than any code
constexpr int kCubeRoom = 8192;                               // entries of a block: 32 KiB
constexpr int kCubeCells = 512;                               // cells of a block, at most

struct Cube {
  uint32_t* table;  // [2^bits, K]
  int bits;         // of a code
  int K;
  const uint8_t* codes;  // [n, bits / 8]
  int64_t n;
};

__device__ inline int cell_of(const uint8_t* codes, int64_t i, int bits) {
  return bits == 8 ? codes[i] : codes[2 * i] | codes[2 * i + 1] << 8;
}

// The sum of `number` over the threads before this one; `total`: over all. Done by all threads of a block.
__device__ inline int sum_before(int number, int* warps, int& total) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  int sum = number;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(step));
    if (lane >= step) sum += below;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int before = sum - number;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  return before;
}

// A block owns kCubeCells cells. It reads all codes, writes down those of its cells in their order, and every thread
// files what is written down for the cells that are its own.
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) cube_insert_kernel(Cube cube) {
  constexpr int kOwn = kCubeCells / kThreads, kEach = 16;  // cells of a thread; codes that it reads at a time, in a row
  __shared__ int warps[kThreads / kWarp];
  __shared__ uint32_t index[kThreads * kEach];
  __shared__ uint16_t cell[kThreads * kEach];
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * kCubeCells;
  int filled[kOwn] = {};
  for (int64_t chunk = 0; chunk < cube.n; chunk += kThreads * kEach) {
    const int64_t start = chunk + thread * kEach;
    int own[kEach], inside = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      own[e] = start + e < cube.n ? cell_of(cube.codes, start + e, cube.bits) - first : -1;
      inside += 0 <= own[e] && own[e] < kCubeCells;
    }
    int written;
    int at = sum_before(inside, warps, written);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (own[e] < 0 || own[e] >= kCubeCells) continue;
      index[at] = static_cast<uint32_t>(start + e);
      cell[at++] = static_cast<uint16_t>(own[e]);
    }
    __syncthreads();
    for (int w = 0; w < written; ++w) {
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        if (cell[w] != o * kThreads + thread || filled[o] == cube.K) continue;
        cube.table[(static_cast<int64_t>(first) + cell[w]) * cube.K + filled[o]++] = index[w];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int own = first + o * kThreads + thread;
    if (own >= 1 << cube.bits) continue;
    for (int j = filled[o]; j < cube.K; ++j) cube.table[static_cast<int64_t>(own) * cube.K + j] = kNobody;
  }
}

__device__ inline uint32_t entry_min(uint32_t a, uint32_t b) { return a < b ? a : b; }
__device__ inline uint32_t entry_max(uint32_t a, uint32_t b) { return a < b ? b : a; }

// Lists of cells a and b that differ in one bit: each takes over the nearer half of both, as a list that rises and falls.
__device__ inline void take_over(uint32_t* a, uint32_t* b, int i, int K) {
  constexpr uint32_t kFurther = uint32_t{1} << kCubeIndexBits;
  const int j = K - 1 - i;
  const uint32_t ai = a[i], aj = a[j], bi = b[i], bj = b[j];
  a[i] = entry_min(ai, bj + kFurther);
  a[j] = entry_min(aj, bi + kFurther);
  b[i] = entry_min(bi, aj + kFurther);
  b[j] = entry_min(bj, ai + kFurther);
}

// Does the bits [from, from + done) of the cell numbers. A block has 2^done cells that differ in these bits, for each of
// `columns` numbers that the lower bits can have; columns lie side by side, so that lists are read in long pieces.
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) cube_pass_kernel(Cube cube, int from, int done, int columns) {
  auto* lists = reinterpret_cast<uint32_t*>(dynamic_shared());  // [2^done, columns, K]
  const int thread = static_cast<int>(threadIdx.x), K = cube.K;
  const int run = columns * K, entries = run << done;
  const int64_t runs_below = (int64_t{1} << from) / columns;  // blocks that share the higher bits
  const int64_t block = blockIdx.x;
  const int64_t start = (block / runs_below << (from + done)) + block % runs_below * columns;  // of the first cell
  for (int e = thread; e < entries; e += kThreads)
    lists[e] = cube.table[(start + (static_cast<int64_t>(e / run) << from)) * K + e % run];
  __syncthreads();
  const int half_lists = entries / 2, work = K == 1 ? half_lists : half_lists / 2;
  for (int bit = 0; bit < done; ++bit) {
    for (int w = thread; w < work; w += kThreads) {  // (pair of lists, i)
      const int per_pair = K == 1 ? 1 : K / 2, pair = w / per_pair, i = w % per_pair;
      const int column = pair % columns, low = pair / columns;
      const int cell = ((low >> bit) << (bit + 1)) | (low & ((1 << bit) - 1));
      uint32_t* a = lists + (cell * columns + column) * K;
      take_over(a, a + (columns << bit) * K, i, K);
    }
    __syncthreads();
    for (int half = K / 2; half > 0; half /= 2) {
      for (int w = thread; w < half_lists; w += kThreads) {
        const int low = 2 * w - (w & (half - 1));
        const uint32_t a = lists[low], b = lists[low + half];
        lists[low] = entry_min(a, b);
        lists[low + half] = entry_max(a, b);
      }
      __syncthreads();
    }
  }
  for (int e = thread; e < entries; e += kThreads)
    cube.table[(start + (static_cast<int64_t>(e / run) << from)) * K + e % run] = lists[e];
}

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) cube_lookup_kernel(Cube cube, const uint8_t* queries, int64_t q, int64_t k,
                                                               Answer answer) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= q * k) return;
  const bool small = q * k <= int64_t{0xffffffff};  // short divisions are many times faster
  const int64_t row = small ? static_cast<uint32_t>(place) / static_cast<uint32_t>(k) : place / k;
  const uint32_t entry = cube.table[static_cast<int64_t>(cell_of(queries, row, cube.bits)) * cube.K + place - row * k];
  answer.distance[place] = static_cast<int32_t>(entry >> kCubeIndexBits);
  answer.index[place] = entry & ((uint32_t{1} << kCubeIndexBits) - 1);
}

}  // namespace ragsr
