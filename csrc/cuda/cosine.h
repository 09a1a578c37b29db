// One block of threads keeps the k best scores of one query. Written in phases that a whole block runs before the next
// one begins, so that tests run the same code on the host, thread after thread.
//
//     keys | the best, sorted: k | collected, in any order | kLowest … |          in shared memory
//
// A tile of scores is read once; what beats the worst of the best is collected. When another tile might not fit, all is
// sorted and cut back to k. Keys are distinct: the order in which threads collect makes no difference.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RAGSR_DEVICE __device__ __forceinline__
#else
#define RAGSR_DEVICE inline
#endif

namespace ragsr {

constexpr int kThreads = 256;
constexpr int kTile = 4 * kThreads;
constexpr int kRoom = 4096;
constexpr int kLargestK = 1024;
constexpr int64_t kLowest = INT64_MIN;

struct BestList {
  int64_t keys[kRoom];
  int64_t worst;
  int collected;
};

// Order of the score above, complement of the index below; NaN, of either sign, below every number.
RAGSR_DEVICE int64_t score_key(float score, int64_t index) {
  int32_t bits;
  const float plus_zero = score == 0.0f ? 0.0f : score;
  memcpy(&bits, &plus_zero, sizeof bits);
  if (score != score) bits = static_cast<int32_t>(0xffc00000u);
  const auto order = static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff));
  return static_cast<int64_t>(static_cast<uint64_t>(order) << 32 | (0xffffffffu - static_cast<uint64_t>(index)));
}

// Bitonic sort of the first `size` keys, a power of two, downwards: runs of growing length alternate in direction.
template <class Block>
RAGSR_DEVICE void sort_keys(const Block& block, BestList& list, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      block.each([&](int thread) {
        for (int pair = thread; pair < size / 2; pair += kThreads) {
          const int i = 2 * pair - (pair & (step - 1));
          const int64_t a = list.keys[i], b = list.keys[i + step];
          if ((a < b) == ((i & run) == 0)) {
            list.keys[i] = b;
            list.keys[i + step] = a;
          }
        }
      });
    }
  }
}

template <class Block>
RAGSR_DEVICE void cut_to_best(const Block& block, BestList& list, int collected, int k) {
  int size = 1;
  while (size < k + collected) size *= 2;
  sort_keys(block, list, size);
  block.each([&](int thread) {
    for (int i = k + thread; i < size; i += kThreads) list.keys[i] = kLowest;
    if (thread == 0) {
      list.worst = list.keys[k - 1];
      list.collected = 0;
    }
  });
}

// best [kept], sorted downwards, and scores [n] of references first … first + n - 1 -> out [k], k <= kept + n
template <class Block, class T>
RAGSR_DEVICE void keep_best_row(const Block& block, BestList& list, const int64_t* best, int kept, const T* scores,
                                int64_t n, int64_t first, int k, int64_t* out) {
  block.each([&](int thread) {
    for (int i = thread; i < kRoom; i += kThreads) list.keys[i] = i < kept ? best[i] : kLowest;
    if (thread == 0) {
      list.worst = kept == k ? best[k - 1] : kLowest;
      list.collected = 0;
    }
  });
  for (int64_t start = 0; start < n; start += kTile) {
    block.each([&](int thread) {
      for (int64_t i = start + thread; i < start + kTile && i < n; i += kThreads) {
        const int64_t key = score_key(static_cast<float>(scores[i]), first + i);
        if (key > list.worst) list.keys[k + block.count(&list.collected)] = key;
      }
    });
    const int collected = list.collected;
    block.wait();  // before anyone collects more
    if (k + collected + kTile > kRoom || start + kTile >= n) cut_to_best(block, list, collected, k);
  }
  block.each([&](int thread) {
    for (int i = thread; i < k; i += kThreads) out[i] = list.keys[i];
  });
}

}  // namespace ragsr
