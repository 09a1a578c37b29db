// Runs the selection of cosine_topk without torch: csrc/cpu/cosine.h, and the phases of csrc/cuda/cosine.h thread after
// thread, both against a stable sort. For sanitizers, and for a machine without a GPU.
//
//     c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc tests/csrc/cosine_driver.cpp
#include "cpu/cosine.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/cosine.h"

namespace {

using namespace ragsr;

std::mt19937 generator(1);

// All threads of a block, one after the other; in falling order every other time, since no order may matter.
struct HostBlock {
  bool backwards;
  template <class Phase>
  void each(const Phase& phase) const {
    for (int i = 0; i < kThreads; ++i) phase(backwards ? kThreads - 1 - i : i);
  }
  int count(int* counter) const { return (*counter)++; }
  void wait() const {}
};

enum Kind { kRandom, kEqual, kFew, kRising, kFalling, kNan, kKinds };

float make_score(int kind, int64_t i) {
  const float random = static_cast<float>(generator() % 20001) / 1e4f - 1;
  if (kind == kEqual) return i % 2 ? 0.0f : -0.0f;
  if (kind == kFew) return static_cast<float>(generator() % 3) - 1;
  if (kind == kRising) return static_cast<float>(i);
  if (kind == kFalling) return -static_cast<float>(i);
  if (kind == kNan && generator() % 3) return generator() % 2 ? std::nanf("") : -std::nanf("");
  return random;
}

// Indices in the order (score downwards, index upwards), NaN last.
std::vector<int64_t> sorted_indices(const std::vector<float>& scores) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (scores[a] != scores[a]) return false;
    return scores[b] != scores[b] || scores[a] > scores[b];
  });
  return order;
}

void check(int kind, int64_t n, int64_t k, int64_t block) {
  std::vector<float> scores(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) scores[i] = make_score(kind, i);
  const std::vector<int64_t> wanted = sorted_indices(scores);
  const int64_t far = (int64_t{1} << 32) - n;  // the largest indices a key can hold
  std::vector<int64_t> on_cpu, on_gpu;
  const auto list = std::make_unique<BestList>();
  for (int64_t first = 0; first < n; first += block) {
    const int64_t length = std::min(block, n - first), number = std::min(k, first + length);
    const std::unique_ptr<float[]> part(new float[static_cast<size_t>(length)]);  // exactly, for the sanitizer
    std::copy(scores.begin() + first, scores.begin() + first + length, part.get());
    const auto kept = static_cast<int64_t>(on_cpu.size());
    on_cpu.resize(static_cast<size_t>(BestKeys::room(number)));
    BestKeys best(on_cpu.data(), kept, number);
    offer_scores(part.get(), length, far + first, best);
    if (best.finish() != number) std::printf("kept too few\n"), std::exit(1);
    on_cpu.resize(static_cast<size_t>(number));
    if (k > kLargestK) continue;
    std::vector<int64_t> out(static_cast<size_t>(number));
    keep_best_row(HostBlock{first % 2 == 1}, *list, on_gpu.data(), static_cast<int>(kept), part.get(), length,
                  far + first, static_cast<int>(number), out.data());
    on_gpu = out;
  }
  for (int64_t i = 0; i < k; ++i) {
    const int64_t index = wanted[i], key = make_key(scores[index], far + index);
    const float score = key_score(key);
    const bool read_back = score == scores[index] || (score != score && scores[index] != scores[index]);
    if (!read_back || on_cpu[i] != key || (k <= kLargestK && on_gpu[i] != key)) {
      std::printf("kind %d n %ld k %ld block %ld: place %ld is wrong\n", kind, long(n), long(k), long(block), long(i));
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (int kind = 0; kind < kKinds; ++kind)
    for (int64_t n : {1, 15, 63, 64, 65, 1000, 5000})
      for (int64_t k : {1, 4, 16, 17, 100, 1000, 1024, 3000})
        for (int64_t block : {int64_t{37}, int64_t{1111}, n})
          if (k <= n) check(kind, n, k, block), ++cases;
  std::printf("%d cases\n", cases);
}
