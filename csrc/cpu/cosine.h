// Rows of length one, and the best scores of a query while blocks of scores go by; free of torch.
//
//     key = order(score) << 32 | ~index
//
// order() puts the bits of floats into the floats' order, so that a larger key is a better match: score downwards, then
// index upwards. -0 counts as 0. NaN, of either sign, ranks below every number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "sums.h"

namespace ragsr {

// ---------------------------------------------------------------- rows of length one

// Divides, where a reciprocal would be faster: rows that differ by a factor then tie more often.
template <class T>
void unit_row(const T* x, int64_t n, T* out) {
  const T length = norm(x, n);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] / length;
}

// ---------------------------------------------------------------- keys

inline int32_t ascending(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

inline int64_t make_key(float score, int64_t index) {
  constexpr auto kNegativeNan = static_cast<int32_t>(0xffc00000u);
  score += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  if (score != score) bits = kNegativeNan;
  const auto order = static_cast<uint32_t>(ascending(bits));
  return static_cast<int64_t>(uint64_t{order} << 32 | (0xffffffffu - static_cast<uint64_t>(index)));
}

inline float key_score(int64_t key) {
  const int32_t bits = ascending(static_cast<int32_t>(key >> 32));
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// ---------------------------------------------------------------- the best of one query

// The k largest keys, sorted downwards. Few are inserted one by one. For many, what is good enough is collected behind
// the sorted ones, up to k of them, and merged in when the room is full: the bound then lags behind a little.
//
//     | sorted, at most k | collected, at most k (none where k is small) |
class BestKeys {
 public:
  static constexpr int64_t kInserted = 16;

  static int64_t room(int64_t k) { return k <= kInserted ? k : 2 * k; }

  // `keys` has room(k) places, of which the first `kept` are sorted already, and must outlive this object.
  BestKeys(int64_t* keys, int64_t kept, int64_t k) : keys_(keys), k_(k), sorted_(kept), size_(kept) { set_bound(); }

  // A later score is of use unless it is <= the bound. A bound that is NaN lets everything through.
  float bound() const { return bound_; }

  void offer(int64_t key) {
    if (key <= worst_) return;
    if (k_ <= kInserted) return insert(key);
    keys_[size_++] = key;
    if (size_ == room(k_)) merge();
  }

  // The number of keys, sorted from the first place on: k, or that of all scores so far.
  int64_t finish() {
    if (size_ > sorted_) merge();
    return sorted_;
  }

 private:
  void insert(int64_t key) {
    int64_t at = sorted_ < k_ ? sorted_++ : k_ - 1;
    for (; at > 0 && keys_[at - 1] < key; --at) keys_[at] = keys_[at - 1];
    keys_[at] = key;
    size_ = sorted_;
    set_bound();
  }

  void merge() {
    std::sort(keys_ + sorted_, keys_ + size_, std::greater<>());
    std::inplace_merge(keys_, keys_ + sorted_, keys_ + size_, std::greater<>());
    size_ = sorted_ = std::min(size_, k_);
    set_bound();
  }

  void set_bound() {
    if (sorted_ < k_) return;
    worst_ = keys_[k_ - 1];
    bound_ = key_score(worst_);
  }

  int64_t* keys_;
  int64_t k_, sorted_, size_;
  int64_t worst_ = std::numeric_limits<int64_t>::min();
  float bound_ = std::numeric_limits<float>::quiet_NaN();
};

template <class T>
bool any_above(const T* scores, int64_t n, float bound) {
  int above = 0;
  for (int64_t i = 0; i < n; ++i) above |= !(static_cast<float>(scores[i]) <= bound);
  return above != 0;
}

// Offers scores[0..n), the first of which belongs to reference `first`. Steps in which nothing is above the bound,
// nearly all of them, are passed over in vectors.
template <class T>
void offer_scores(const T* scores, int64_t n, int64_t first, BestKeys& best) {
  constexpr int64_t kStep = 64;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t end = std::min(n, begin + kStep);
    if (end - begin == kStep && !any_above(scores + begin, kStep, best.bound())) continue;
    for (int64_t i = begin; i < end; ++i) {
      const auto score = static_cast<float>(scores[i]);
      if (!(score <= best.bound())) best.offer(make_key(score, first + i));
    }
  }
}

}  // namespace ragsr
