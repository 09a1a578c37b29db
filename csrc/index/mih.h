// MultiIndexHash: exact k nearest codes by buckets, without looking at most of them (Norouzi, Punjani, Fleet, "Fast
// exact search in Hamming space with multi-index hashing", 2014, section 3).
//
// A code is cut into m parts, and each part has a table from its value to the codes that have it. Ring (a, j) looks up
// part j of the query with every choice of a bits flipped. Rings go (0,0) (0,1) .. (0,m-1) (1,0) ..; after (a, j), a
// code not met differs in more than a bits in parts 0..j and in at least a bits in the others:
//
//     distance >= (j + 1)(a + 1) + (m - 1 - j) a = m a + j + 1
//
// so all codes within R = m a + j have been met, and once the k best of those met lie within R they are the answer.
//
// A code is met in several rings. It is taken in the first, which its own parts tell, so no set of seen codes is kept.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "view.h"

namespace ragsr {

enum class Plan { automatic, buckets, scan };

class MultiIndexHash {
 public:
  explicit MultiIndexHash(std::shared_ptr<const View> view, int64_t parts = 0) : view_(std::move(view)) {
    if (view_->total() >= int64_t{1} << 32)
      throw std::invalid_argument("a multi-index hash holds fewer than 2^32 codes");
    const int64_t bits = 8 * view_->width();
    const int64_t fewest = (bits + kMostBits - 1) / kMostBits;
    if (parts != 0 && (parts < fewest || parts > bits))
      throw std::invalid_argument("parts is " + std::to_string(parts) + "; codes of " + std::to_string(bits) +
                                  " bits can be cut into " + std::to_string(fewest) + " to " + std::to_string(bits));
    if (parts == 0) {  // as many codes as values of a part: a bucket then holds about one
      const double best = std::log2(std::max<double>(16, static_cast<double>(view_->total())));
      parts = std::clamp<int64_t>(std::llround(static_cast<double>(bits) / best), fewest, bits);
    }
    view_->check_blocks();
    for (int64_t part = 0; part < parts; ++part) parts_.push_back({bits * part / parts, 0, {}, {}});
    for (int64_t part = 0; part < parts; ++part)
      parts_[static_cast<size_t>(part)].bits = bits * (part + 1) / parts - parts_[static_cast<size_t>(part)].begin;
    run_parallel(thread_count(), parts, [&](int64_t part) { fill(parts_[static_cast<size_t>(part)]); });
  }

  const View& view() const { return *view_; }
  int64_t parts() const { return static_cast<int64_t>(parts_.size()); }
  int64_t scanned() const { return scanned_; }  // queries that the scan answered, since this was built

  // distance, id [q, k], as View::search gives them.
  //
  // The plan: buckets, until a query has cost half of what its scan would; then the scan, for all such queries at once.
  // If most of the first queries end that way, the others are not tried at all.
  void search(const uint8_t* queries, int64_t q, int64_t k, int32_t* distance, int64_t* id, Plan plan) const {
    const double budget = plan == Plan::buckets ? HUGE_VAL : plan == Plan::scan ? 0 : scan_cost() / 2;
    std::vector<char> answered(static_cast<size_t>(q), 0);
    const auto attempt = [&](int64_t begin, int64_t end) {
      const int64_t tasks = (end - begin + kBatch - 1) / kBatch;
      run_parallel(thread_count(), tasks, [&](int64_t task) {
        for (int64_t row = begin + task * kBatch; row < std::min(end, begin + (task + 1) * kBatch); ++row)
          answered[static_cast<size_t>(row)] = Attempt(*this, queries + row * view_->width(), k, budget)
                                                   .run(distance + row * k, id + row * k);
      });
    };
    const int64_t first = std::min(q, kTried);
    if (plan != Plan::scan) attempt(0, first);
    if (2 * std::count(answered.begin(), answered.end(), 1) >= first && plan != Plan::scan) attempt(first, q);
    scan_rest(queries, q, k, distance, id, answered);
  }

 private:
  static constexpr int64_t kMostBits = 24;  // 2^24 buckets: 64 MB of starts per part
  static constexpr int64_t kTried = 16;     // queries
  static constexpr int64_t kBatch = 8;      // queries per task

  // Rough costs in nanoseconds of one core: a look-up, a distance to a code out of the cache, a byte at 20 GB/s. They
  // only have to tell tenfold differences apart.
  static constexpr double kProbeCost = 4;
  static constexpr double kCandidateCost = 6;
  static constexpr double kScannedByteCost = 0.05;

  double scan_cost() const { return kScannedByteCost * static_cast<double>(view_->total() * view_->width()); }

  struct Part {
    int64_t begin;  // its first bit
    int64_t bits;
    std::vector<uint32_t> starts;  // [2^bits + 1]: codes with the value v are ids[starts[v] .. starts[v + 1])
    std::vector<uint32_t> ids;

    uint32_t of(const uint8_t* code, int64_t width) const {
      uint64_t word = 0;  // 7 + 24 bits are enough
      std::memcpy(&word, code + begin / 8, static_cast<size_t>(std::min<int64_t>(8, width - begin / 8)));
      return static_cast<uint32_t>(word >> begin % 8 & ((uint64_t{1} << bits) - 1));
    }
  };

  // Counting sort by the value of the part: ids stay ascending within a bucket.
  void fill(Part& part) const {
    const int64_t width = view_->width();
    const auto each_live = [&](const auto& body) {
      view_->for_each_piece(0, view_->total(), view_->total(), [&](const uint8_t* codes, int64_t rows, int64_t first) {
        for (int64_t i = 0; i < rows; ++i)
          if (!view_->removed->has(first + i))
            body(part.of(codes + i * width, width), static_cast<uint32_t>(first + i));
      });
    };
    part.starts.assign((size_t{1} << part.bits) + 1, 0);
    each_live([&](uint32_t value, uint32_t) { ++part.starts[value + 1]; });
    for (size_t value = 1; value < part.starts.size(); ++value) part.starts[value] += part.starts[value - 1];
    part.ids.resize(part.starts.back());
    std::vector<uint32_t> next(part.starts.begin(), part.starts.end() - 1);
    each_live([&](uint32_t value, uint32_t id) { part.ids[next[value]++] = id; });
  }

  void scan_rest(const uint8_t* queries, int64_t q, int64_t k, int32_t* distance, int64_t* id,
                 const std::vector<char>& answered) const {
    const int64_t width = view_->width();
    std::vector<int64_t> rows;
    std::vector<uint8_t> packed;
    for (int64_t row = 0; row < q; ++row) {
      if (answered[static_cast<size_t>(row)]) continue;
      rows.push_back(row);
      packed.insert(packed.end(), queries + row * width, queries + (row + 1) * width);
    }
    if (rows.empty()) return;
    scanned_ += static_cast<int64_t>(rows.size());
    std::vector<int32_t> distances(rows.size() * static_cast<size_t>(k));
    std::vector<int64_t> ids(rows.size() * static_cast<size_t>(k));
    view_->search(packed.data(), static_cast<int64_t>(rows.size()), k, distances.data(), ids.data());
    for (size_t i = 0; i < rows.size(); ++i) {
      std::copy_n(&distances[i * static_cast<size_t>(k)], k, distance + rows[i] * k);
      std::copy_n(&ids[i * static_cast<size_t>(k)], k, id + rows[i] * k);
    }
  }

  // One query.
  class Attempt {
   public:
    Attempt(const MultiIndexHash& hash, const uint8_t* query, int64_t k, double budget)
        : hash_(hash), view_(*hash.view_), query_(query), k_(k), budget_(budget) {
      for (const Part& part : hash.parts_) values_.push_back(part.of(query, view_.width()));
    }

    // False where the scan is cheaper.
    bool run(int32_t* distance, int64_t* id) {
      const int64_t parts = hash_.parts();
      for (int64_t radius = 0; radius <= kMostBits; ++radius)
        for (int64_t part = 0; part < parts; ++part) {
          if (!ring(radius, static_cast<size_t>(part))) return false;
          if (static_cast<int64_t>(best_.size()) == k_ && key_distance(best_.front()) <= parts * radius + part)
            return write(distance, id);
        }
      return write(distance, id);  // every code was met
    }

   private:
    static constexpr size_t kProbes = 64;
    static constexpr size_t kCandidates = 256;

    bool write(int32_t* distance, int64_t* id) {
      std::sort_heap(best_.begin(), best_.end());
      std::transform(best_.begin(), best_.end(), distance, key_distance);
      std::transform(best_.begin(), best_.end(), id, key_index);
      return true;
    }

    // Looks up every value of the part that differs in `radius` bits. False where that costs too much.
    bool ring(int64_t radius, size_t number) {
      const Part& part = hash_.parts_[number];
      if (radius > part.bits) return true;
      double probes = 1;
      for (int64_t i = 0; i < radius; ++i) probes *= static_cast<double>(part.bits - i) / static_cast<double>(i + 1);
      const double bucket = static_cast<double>(part.ids.size()) / static_cast<double>(part.starts.size());
      if (spent_ + probes * (kProbeCost + bucket * kCandidateCost) > budget_) return false;
      spent_ += probes * kProbeCost;

      radius_ = radius;
      number_ = number;
      const uint64_t end = uint64_t{1} << part.bits;
      uint64_t flips = (uint64_t{1} << radius) - 1;
      uint32_t values[kProbes];
      while (flips < end) {
        size_t count = 0;
        for (; count < kProbes && flips < end; ++count) {
          values[count] = values_[number] ^ static_cast<uint32_t>(flips);
          __builtin_prefetch(&part.starts[values[count]]);
          flips = radius == 0 ? end : next_choice(flips);
        }
        for (size_t i = 0; i < count; ++i)
          if (!bucket_of(part, values[i])) return false;
      }
      verify();
      return true;
    }

    // The next larger number with as many bits set.
    static uint64_t next_choice(uint64_t x) {
      const uint64_t lowest = x & (~x + 1);
      const uint64_t ripple = x + lowest;
      return ripple | ((x ^ ripple) / lowest >> 2);
    }

    bool bucket_of(const Part& part, uint32_t value) {
      const uint32_t begin = part.starts[value];
      const uint32_t end = part.starts[value + 1];
      spent_ += (end - begin) * kCandidateCost;
      if (spent_ > budget_) return false;
      for (uint32_t i = begin; i < end; ++i) {
        codes_[count_] = view_.code(part.ids[i]);
        ids_[count_] = part.ids[i];
        __builtin_prefetch(codes_[count_]);
        if (++count_ == kCandidates) verify();
      }
      return true;
    }

    // Distances of all that were collected, in one call of the kernel.
    void verify() {
      const int64_t width = view_.width();
      gathered_.resize(kCandidates * static_cast<size_t>(width));
      for (size_t i = 0; i < count_; ++i)
        std::memcpy(&gathered_[i * static_cast<size_t>(width)], codes_[i], static_cast<size_t>(width));
      uint16_t distance[kCandidates];
      view_.distances()(query_, gathered_.data(), static_cast<int64_t>(count_), width, distance);
      for (size_t i = 0; i < count_; ++i) {
        const uint64_t key = make_key(distance[i], ids_[i]);
        const bool full = static_cast<int64_t>(best_.size()) == k_;
        if ((full && key >= best_.front()) || !met_first(codes_[i])) continue;
        if (full) {
          std::pop_heap(best_.begin(), best_.end());
          best_.pop_back();
        }
        best_.push_back(key);
        std::push_heap(best_.begin(), best_.end());
      }
      count_ = 0;
    }

    // Whether this ring is the first that meets the code.
    bool met_first(const uint8_t* code) const {
      for (size_t other = 0; other < values_.size(); ++other) {
        const int64_t there = __builtin_popcount(values_[other] ^ hash_.parts_[other].of(code, view_.width()));
        if (there < radius_ || (there == radius_ && other < number_)) return false;
      }
      return true;
    }

    const MultiIndexHash& hash_;
    const View& view_;
    const uint8_t* query_;
    int64_t k_;
    double budget_;
    double spent_ = 0;
    std::vector<uint32_t> values_;  // [parts] of the query
    std::vector<uint64_t> best_;    // a max-heap of keys, at most k
    int64_t radius_ = 0;            // the ring
    size_t number_ = 0;
    const uint8_t* codes_[kCandidates];
    uint32_t ids_[kCandidates];
    size_t count_ = 0;
    std::vector<uint8_t> gathered_;
  };

  std::shared_ptr<const View> view_;
  std::vector<Part> parts_;
  mutable std::atomic<int64_t> scanned_{0};
};

}  // namespace ragsr
