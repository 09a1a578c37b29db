// What this processor can do at most, measured: one number, printed.
//
//     ceilings read BYTES THREADS     bytes read per second from a buffer of BYTES that stays where it fits
//     ceilings popcount THREADS       64-bit words per second through xor, popcount and minimum, all in registers
//
// Compiled with -march=native by limits.py. `popcount` prints 0 where there is no vector popcount (AVX-512 VPOPCNTDQ).
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX512VPOPCNTDQ__
#include <immintrin.h>
#endif

namespace {

constexpr int kRounds = 9;
volatile uint64_t sink;  // keeps the compiler from leaving the work out

typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));

// Every word of the buffer is read; xor is the least that can be done with it.
void read_words(const uint64_t* from, size_t words) {
  Words sum[8] = {};
  size_t i = 0;
  for (; i + 64 <= words; i += 64)
    for (int j = 0; j < 8; ++j) sum[j] ^= *reinterpret_cast<const Words*>(from + i + 8 * j);
  uint64_t rest = 0;
  for (; i < words; ++i) rest ^= from[i];
  for (int j = 0; j < 8; ++j)
    for (int lane = 0; lane < 8; ++lane) rest ^= sum[j][lane];
  sink = rest;
}

// Eight vectors of eight words per step; eight minima, so that none waits for another.
constexpr int64_t kSteps = 1 << 21, kWordsPerStep = 8 * 8;

void count_words() {
#ifdef __AVX512VPOPCNTDQ__
  const __m512i query = _mm512_set1_epi64(0x13579bdf02468ace);
  __m512i code = _mm512_set1_epi64(0x0123456789abcdef), least[8];
  for (auto& x : least) x = _mm512_set1_epi32(-1);
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      asm volatile("" : "+v"(code));  // another code, as far as the compiler knows
      least[i] = _mm512_min_epu32(least[i], _mm512_popcnt_epi64(_mm512_xor_si512(code, query)));
    }
  }
  uint64_t words[8];
  for (auto& x : least) std::memcpy(words, &x, sizeof words), sink = words[0];
#endif
}

// The best of some rounds of body(thread) on all threads, in seconds.
template <class Body>
double best_seconds(int threads, const Body& body) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
    body(0);
    for (auto& other : others) other.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

double read_rate(size_t bytes, int threads) {
  const size_t words = bytes / 8 / static_cast<size_t>(threads);
  std::vector<uint64_t> buffer(words * static_cast<size_t>(threads));
  for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = i * 0x9e3779b97f4a7c15;
  // so often that starting the threads does not count
  const size_t times = std::max<size_t>(1, (size_t{1} << 28) / std::max<size_t>(bytes, 1));
  const double seconds = best_seconds(threads, [&](int thread) {
    for (size_t i = 0; i < times; ++i) read_words(buffer.data() + static_cast<size_t>(thread) * words, words);
  });
  return static_cast<double>(buffer.size() * 8 * times) / seconds;
}

double popcount_rate(int threads) {
#ifdef __AVX512VPOPCNTDQ__
  return static_cast<double>(kSteps * kWordsPerStep * threads) / best_seconds(threads, [](int) { count_words(); });
#else
  return 0 * threads;
#endif
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 4 && std::strcmp(arguments[1], "read") == 0) {
    std::printf("%.6g\n", read_rate(std::strtoull(arguments[2], nullptr, 10), std::atoi(arguments[3])));
  } else if (count == 3 && std::strcmp(arguments[1], "popcount") == 0) {
    std::printf("%.6g\n", popcount_rate(std::atoi(arguments[2])));
  } else {
    std::fprintf(stderr, "ceilings read BYTES THREADS | ceilings popcount THREADS\n");
    return 2;
  }
}
