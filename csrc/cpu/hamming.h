// Hamming distance and exact top-k on the CPU, free of torch: shared by the op (ragsr._cpu) and the index (ragsr._index).
//
// One query against a block of codes is the only inner loop (`DistanceKernel`), written three times: for any machine,
// for AVX2 and for AVX-512 VPOPCNTDQ. The best one the machine has is chosen at run time; RAGSR_CPU=portable|avx2|avx512
// forces one. Selection keeps the k smallest keys
//
//     key = distance << 48 | index
//
// so that the order of integers is the order (distance, index), ties included. Codes are scanned by growing index:
// an equal distance can never replace one that is already kept, and the test against the heap is `distance < worst`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define RAGSR_X86 1
#include <immintrin.h>
#endif

namespace ragsr {

// distances of `query` [width] to codes [n, width], row after row
using DistanceKernel = void (*)(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width, uint16_t* out);

inline int popcount_words(const uint8_t* a, const uint8_t* b, int64_t width) {
  int count = 0;
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    uint64_t x, y;
    std::memcpy(&x, a + i, 8);
    std::memcpy(&y, b + i, 8);
    count += __builtin_popcountll(x ^ y);
  }
  for (; i < width; ++i) count += __builtin_popcount(a[i] ^ b[i]);
  return count;
}

inline void distances_portable(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(popcount_words(query, codes + i * width, width));
}

#ifdef RAGSR_X86

#define RAGSR_AVX2 __attribute__((target("avx2,popcnt")))
#define RAGSR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vpopcntdq,popcnt")))

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
  if (width == 8) {  // four codes per vector
    uint64_t word;
    std::memcpy(&word, query, 8);
    const __m256i q = _mm256_set1_epi64x(static_cast<long long>(word));
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 8 * i));
      alignas(32) uint64_t count[4];
      _mm256_store_si256(reinterpret_cast<__m256i*>(count), popcount_lanes(_mm256_xor_si256(c, q)));
      for (int j = 0; j < 4; ++j) out[i + j] = static_cast<uint16_t>(count[j]);
    }
    for (; i < n; ++i) out[i] = static_cast<uint16_t>(popcount_words(query, codes + 8 * i, 8));
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

RAGSR_AVX512 inline void distances_avx512(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width,
                                          uint16_t* out) {
  if (width == 8) {  // eight codes per vector
    uint64_t word;
    std::memcpy(&word, query, 8);
    const __m512i q = _mm512_set1_epi64(static_cast<long long>(word));
    for (int64_t i = 0; i < n; i += 8) {
      const __mmask8 lanes = static_cast<__mmask8>(n - i >= 8 ? 0xff : (1u << (n - i)) - 1);
      const __m512i c = _mm512_maskz_loadu_epi64(lanes, codes + 8 * i);
      _mm512_mask_cvtepi64_storeu_epi16(out + i, lanes, _mm512_popcnt_epi64(_mm512_xor_si512(c, q)));
    }
    return;
  }
  if (width < 32) {  // a masked vector per code would be mostly empty
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(popcount_words(query, codes + i * width, width));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < width; j += 64) {
      const __mmask64 bytes = width - j >= 64 ? ~__mmask64{0} : (__mmask64{1} << (width - j)) - 1;
      const __m512i q = _mm512_maskz_loadu_epi8(bytes, query + j);
      const __m512i c = _mm512_maskz_loadu_epi8(bytes, codes + i * width + j);
      sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(c, q)));
    }
    out[i] = static_cast<uint16_t>(_mm512_reduce_add_epi64(sum));
  }
}

#endif  // RAGSR_X86

struct CpuKernel {
  const char* name;
  DistanceKernel distances;
};

// What this machine can run, best last.
inline std::vector<CpuKernel> available_kernels() {
  std::vector<CpuKernel> kernels{{"portable", distances_portable}};
#ifdef RAGSR_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) kernels.push_back({"avx2", distances_avx2});
  if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    kernels.push_back({"avx512", distances_avx512});
#endif
  return kernels;
}

// The best kernel of this machine, or the one RAGSR_CPU names. Throws std::runtime_error for one it has not.
inline CpuKernel choose_kernel() {
  const std::vector<CpuKernel> kernels = available_kernels();
  const char* wanted = std::getenv("RAGSR_CPU");
  if (wanted == nullptr || *wanted == '\0') return kernels.back();
  std::string names;
  for (const CpuKernel& kernel : kernels) {
    if (std::strcmp(kernel.name, wanted) == 0) return kernel;
    names += std::string(names.empty() ? "" : ", ") + kernel.name;
  }
  throw std::runtime_error("RAGSR_CPU is '" + std::string(wanted) + "', but this machine has: " + names);
}

// ---------------------------------------------------------------- the k nearest

constexpr int kIndexBits = 48;

// Sorted keys of the min(k, end - begin) codes in [begin, end) that are nearest to one query.
inline std::vector<uint64_t> nearest_keys(DistanceKernel distances, const uint8_t* query, const uint8_t* codes,
                                          int64_t begin, int64_t end, int64_t width, int64_t k) {
  constexpr int64_t kBlock = 4096;
  uint16_t distance[kBlock];
  std::vector<uint64_t> heap;  // a max-heap: the worst kept key is in front
  heap.reserve(static_cast<size_t>(std::min(k, end - begin)));
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    distances(query, codes + start * width, count, width, distance);
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t key = static_cast<uint64_t>(distance[i]) << kIndexBits | static_cast<uint64_t>(start + i);
      if (static_cast<int64_t>(heap.size()) < k) {
        heap.push_back(key);
        std::push_heap(heap.begin(), heap.end());
      } else if (key < heap.front()) {
        std::pop_heap(heap.begin(), heap.end());
        heap.back() = key;
        std::push_heap(heap.begin(), heap.end());
      }
    }
  }
  std::sort_heap(heap.begin(), heap.end());
  return heap;
}

// distance, index [q, k] from queries [q, width] and codes [n, width], 1 <= k <= n.
// `parallel(tasks, body)` calls body(task) for every task, on as many threads as it likes; `threads` says how many those
// are, so that a few queries are split over the codes as well and use them all.
template <class Parallel>
void hamming_topk(DistanceKernel distances, const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n,
                  int64_t width, int64_t k, int32_t* distance, int64_t* index, int64_t threads, Parallel parallel) {
  if (q == 0) return;
  constexpr int64_t kSmallestPart = 1 << 16;
  const int64_t wanted = (threads + q - 1) / q;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, n / kSmallestPart));
  const int64_t part = (n + parts - 1) / parts;
  std::vector<std::vector<uint64_t>> found(static_cast<size_t>(q * parts));
  parallel(q * parts, [&](int64_t task) {
    const int64_t begin = task % parts * part;
    found[static_cast<size_t>(task)] = nearest_keys(distances, queries + task / parts * width, codes, begin,
                                                    std::min(n, begin + part), width, k);
  });
  for (int64_t row = 0; row < q; ++row) {
    std::vector<uint64_t>& keys = found[static_cast<size_t>(row * parts)];
    for (int64_t other = 1; other < parts; ++other) {
      const std::vector<uint64_t>& more = found[static_cast<size_t>(row * parts + other)];
      const auto middle = static_cast<std::ptrdiff_t>(keys.size());
      keys.insert(keys.end(), more.begin(), more.end());
      std::inplace_merge(keys.begin(), keys.begin() + middle, keys.end());
    }
    for (int64_t j = 0; j < k; ++j) {
      const uint64_t key = keys[static_cast<size_t>(j)];
      distance[row * k + j] = static_cast<int32_t>(key >> kIndexBits);
      index[row * k + j] = static_cast<int64_t>(key & ((uint64_t{1} << kIndexBits) - 1));
    }
    std::vector<uint64_t>().swap(keys);
  }
}

}  // namespace ragsr
