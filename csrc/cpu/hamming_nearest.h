// The k nearest codes of one query while codes go by in the order of their index.
//
//     key = distance << 48 | index
//
// The order of these integers is the order (distance, index), ties included.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ragsr {

constexpr int kIndexBits = 48;

inline uint64_t make_key(int64_t distance, int64_t index) {
  return static_cast<uint64_t>(distance) << kIndexBits | static_cast<uint64_t>(index);
}
inline int32_t key_distance(uint64_t key) { return static_cast<int32_t>(key >> kIndexBits); }
inline int64_t key_index(uint64_t key) { return static_cast<int64_t>(key & ((uint64_t{1} << kIndexBits) - 1)); }

// Few keys are kept sorted. Many are collected without order in twice the room and cut back to k when it is full: the
// bound then lags behind, by at most k codes that were worth nothing.
class Nearest {
 public:
  static constexpr int64_t kSorted = 16;

  static int64_t room(int64_t k) { return k <= kSorted ? k : 2 * k; }

  // `keys` has room(k) places and must outlive this object
  Nearest(uint64_t* keys, int64_t k) : keys_(keys), k_(k) {}

  // A code of higher index than all seen so far is of no use from this distance on.
  int64_t bound() const { return bound_; }

  void offer(uint64_t key) {
    if (key >= worst_) return;
    if (k_ <= kSorted) return insert(key);
    keys_[size_++] = key;
    if (size_ == 2 * k_) cut();
  }

  // The kept keys, sorted; their number is k, or that of all codes offered.
  int64_t finish() {
    if (k_ > kSorted) {
      if (size_ > k_) cut();
      std::sort(keys_, keys_ + size_);
    }
    return size_;
  }

  const uint64_t* keys() const { return keys_; }

 private:
  void insert(uint64_t key) {
    int64_t at = size_ < k_ ? size_++ : k_ - 1;
    for (; at > 0 && keys_[at - 1] > key; --at) keys_[at] = keys_[at - 1];
    keys_[at] = key;
    if (size_ == k_) set_worst(keys_[k_ - 1]);
  }

  void cut() {
    std::nth_element(keys_, keys_ + k_ - 1, keys_ + size_);
    size_ = k_;
    set_worst(keys_[k_ - 1]);
  }

  void set_worst(uint64_t key) {
    worst_ = key;
    bound_ = key_distance(key);
  }

  uint64_t* keys_;
  int64_t k_;
  int64_t size_ = 0;
  uint64_t worst_ = ~uint64_t{0};
  int64_t bound_ = int64_t{1} << 15;  // above every distance
};

// Sorted keys of the k smallest among distance[0..n), the first of which has index `first`: counts how often each
// distance occurs, then writes every key to its place. For a k that is no small part of n. `keys` has room for k.
inline void nearest_by_counting(const uint16_t* distance, int64_t n, int64_t first, int64_t k, int64_t bits,
                                uint64_t* keys) {
  std::vector<int64_t> place(static_cast<size_t>(bits) + 2);
  for (int64_t i = 0; i < n; ++i) ++place[distance[i] + size_t{1}];
  for (size_t d = 1; d < place.size(); ++d) place[d] += place[d - 1];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = place[distance[i]]++;
    if (at < k) keys[at] = make_key(distance[i], first + i);
  }
}

// Where the k nearest of each query go: distance and index [q, k].
struct Answer {
  int32_t* distance;
  int64_t* index;
  int64_t k;

  void write(int64_t row, const uint64_t* keys) const {
    for (int64_t j = 0; j < k; ++j) {
      distance[row * k + j] = key_distance(keys[j]);
      index[row * k + j] = key_index(keys[j]);
    }
  }
};

}  // namespace ragsr
