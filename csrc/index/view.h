// View: an index at one moment. It never changes, so any number of threads search it without a lock.
//
//     segments   [first, first + rows) each, in the order of ids, end to end; in memory or in a mapped file
//     removed    one bit per id; the code stays where it is and is never returned
//
//     ids   0 ........ 99 | 100 .................... 899 | 900 .. 999 | 1000 ...
//           mapped record |         mapped record        |  memory    |  (the writer's, not in this view)
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "../cpu/hamming.h"
#include "parallel.h"

namespace ragsr {

// Holes: a set of ids. It is copied to be changed, so its bits lie in pages that copies share.
class Removed {
 public:
  int64_t count() const { return count_; }

  bool has(int64_t id) const {
    const size_t page = static_cast<size_t>(id / kPageBits);
    return page < pages_.size() && pages_[page] && ((*pages_[page])[word_of(id)] >> (id % 64) & 1);
  }

  // Adds ids [n], ascending; copies the pages it writes to, each once.
  void insert(const int64_t* ids, int64_t n) {
    std::shared_ptr<Page> page;
    int64_t number = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (ids[i] / kPageBits != number) {
        number = ids[i] / kPageBits;
        page = writable(static_cast<size_t>(number));
      }
      (*page)[word_of(ids[i])] |= uint64_t{1} << (ids[i] % 64);
    }
    count_ += n;
  }

  std::vector<int64_t> ids() const {  // ascending
    std::vector<int64_t> found;
    for (size_t page = 0; page < pages_.size(); ++page) {
      if (!pages_[page]) continue;
      for (size_t word = 0; word < pages_[page]->size(); ++word)
        for (uint64_t bits = (*pages_[page])[word]; bits; bits &= bits - 1)
          found.push_back(static_cast<int64_t>(page) * kPageBits + static_cast<int64_t>(word) * 64 +
                          __builtin_ctzll(bits));
    }
    return found;
  }

 private:
  static constexpr int64_t kPageBits = 1 << 16;
  using Page = std::array<uint64_t, kPageBits / 64>;

  static size_t word_of(int64_t id) { return static_cast<size_t>(id % kPageBits / 64); }

  std::shared_ptr<Page> writable(size_t number) {
    if (number >= pages_.size()) pages_.resize(number + 1);
    auto page = pages_[number] ? std::make_shared<Page>(*pages_[number]) : std::make_shared<Page>(Page{});
    pages_[number] = page;
    return page;
  }

  std::vector<std::shared_ptr<const Page>> pages_;
  int64_t count_ = 0;
};

// Codes of a file that were mapped and not read yet: the first search checks them against their checksums.
class Unchecked {
 public:
  virtual ~Unchecked() = default;
  virtual void check() = 0;  // throws where the file is damaged; costs nothing once all is checked
};

struct Segment {
  std::shared_ptr<const void> keep;  // owns what `codes` points into
  const uint8_t* codes;              // [rows, width]
  int64_t first;                     // the id of row 0
  int64_t rows;
  std::shared_ptr<Unchecked> unchecked;  // null for memory
};

struct Ranges {
  std::vector<int64_t> limits;  // [q + 1]
  std::vector<uint64_t> keys;   // [limits[q]], sorted within each query
};

class View {
 public:
  std::vector<Segment> segments;
  std::shared_ptr<const Removed> removed = std::make_shared<Removed>();

  View(int64_t width, DistanceKernel distances) : width_(width), distances_(distances) {}

  int64_t width() const { return width_; }
  DistanceKernel distances() const { return distances_; }
  int64_t total() const { return segments.empty() ? 0 : segments.back().first + segments.back().rows; }
  int64_t live() const { return total() - removed->count(); }

  void check_blocks() const {
    for (const Segment& segment : segments)
      if (segment.unchecked) segment.unchecked->check();
  }

  const uint8_t* code(int64_t id) const {
    auto after = std::upper_bound(segments.begin(), segments.end(), id,
                                  [](int64_t wanted, const Segment& segment) { return wanted < segment.first; });
    const Segment& segment = *(after - 1);
    return segment.codes + (id - segment.first) * width_;
  }

  // body(codes, rows, first id) over the ids [begin, end), in pieces of at most `step` rows
  template <class Body>
  void for_each_piece(int64_t begin, int64_t end, int64_t step, const Body& body) const {
    for (const Segment& segment : segments) {
      const int64_t last = std::min(end, segment.first + segment.rows);
      for (int64_t id = std::max(begin, segment.first); id < last; id += step)
        body(segment.codes + (id - segment.first) * width_, std::min(step, last - id), id);
    }
  }

  // distance, id [q, k] of the k nearest live codes, 1 <= k <= live().
  //
  // The scan knows nothing of removed codes. It is asked for some more than k and the removed are dropped; a query
  // for which that was not enough takes the slower scan that looks at the bits of `removed`.
  void search(const uint8_t* queries, int64_t q, int64_t k, int32_t* distance, int64_t* id) const {
    check_blocks();
    if (segments.size() == 1 && removed->count() == 0) return scan(segments[0], queries, q, k, distance, id);
    const int64_t more = removed->count() == 0 ? 0 : 32 + 2 * (k * removed->count() / live() + 1);
    std::vector<std::vector<uint64_t>> best(static_cast<size_t>(q));
    std::vector<uint64_t> bound(static_cast<size_t>(q), ~uint64_t{0});  // keys up to here are known, of every segment
    for (const Segment& segment : segments)
      merge(segment, queries, q, k, std::min(k + more, segment.rows), best.data(), bound.data());
    std::vector<int64_t> short_of;
    for (int64_t row = 0; row < q; ++row) {
      const std::vector<uint64_t>& keys = best[static_cast<size_t>(row)];
      if (static_cast<int64_t>(keys.size()) < k || keys.back() > bound[static_cast<size_t>(row)])
        short_of.push_back(row);
    }
    run_parallel(thread_count(), static_cast<int64_t>(short_of.size()), [&](int64_t task) {
      const int64_t row = short_of[static_cast<size_t>(task)];
      best[static_cast<size_t>(row)] = nearest_live(queries + row * width_, k);
    });
    for (int64_t row = 0; row < q; ++row)
      for (int64_t j = 0; j < k; ++j) {
        const uint64_t key = best[static_cast<size_t>(row)][static_cast<size_t>(j)];
        distance[row * k + j] = key_distance(key);
        id[row * k + j] = key_index(key);
      }
  }

  // All live codes within `radius` of every query.
  Ranges range_search(const uint8_t* queries, int64_t q, int64_t radius) const {
    check_blocks();
    const int64_t most = std::max<int64_t>(1, total() / kSmallestPart);
    const int64_t parts = std::min(most, q == 0 ? 1 : (4 * thread_count() + q - 1) / q);
    std::vector<std::vector<uint64_t>> found(static_cast<size_t>(q * parts));
    run_parallel(threads_for(q), q * parts, [&](int64_t task) {
      const int64_t part = task % parts;
      found[static_cast<size_t>(task)] = within(queries + task / parts * width_, radius, total() * part / parts,
                                                total() * (part + 1) / parts);
    });
    Ranges ranges{{0}, {}};
    for (int64_t row = 0; row < q; ++row) {
      for (int64_t part = 0; part < parts; ++part) {
        std::vector<uint64_t>& keys = found[static_cast<size_t>(row * parts + part)];
        ranges.keys.insert(ranges.keys.end(), keys.begin(), keys.end());
        std::vector<uint64_t>().swap(keys);
      }
      std::sort(ranges.keys.begin() + ranges.limits.back(), ranges.keys.end());
      ranges.limits.push_back(static_cast<int64_t>(ranges.keys.size()));
    }
    return ranges;
  }

 private:
  static constexpr int64_t kBlock = 4096;             // codes per call of the distance kernel
  static constexpr int64_t kSmallestPart = 1 << 16;  // distances worth a thread

  int64_t threads_for(int64_t q) const {
    return std::min(thread_count(), std::max<int64_t>(1, q * total() / kSmallestPart));
  }

  void scan(const Segment& segment, const uint8_t* queries, int64_t q, int64_t k, int32_t* distance,
            int64_t* row) const {
    const int64_t threads = threads_for(q);
    hamming_topk(distances_, queries, q, segment.codes, segment.rows, width_, k, distance, row, threads,
                 [&](int64_t tasks, const auto& body) { run_parallel(threads, tasks, body); });
  }

  // Joins the `wanted` nearest of one segment into best [q]: sorted keys, at most k.
  void merge(const Segment& segment, const uint8_t* queries, int64_t q, int64_t k, int64_t wanted,
             std::vector<uint64_t>* best, uint64_t* bound) const {
    std::vector<int32_t> distance(static_cast<size_t>(q * wanted));
    std::vector<int64_t> row_of(static_cast<size_t>(q * wanted));
    scan(segment, queries, q, wanted, distance.data(), row_of.data());
    for (int64_t row = 0; row < q; ++row) {
      std::vector<uint64_t>& keys = best[row];
      const auto middle = static_cast<std::ptrdiff_t>(keys.size());
      uint64_t key = 0;
      for (int64_t j = row * wanted; j < (row + 1) * wanted; ++j) {
        const int64_t id = segment.first + row_of[static_cast<size_t>(j)];
        key = make_key(distance[static_cast<size_t>(j)], id);
        if (!removed->has(id)) keys.push_back(key);
      }
      std::inplace_merge(keys.begin(), keys.begin() + middle, keys.end());
      keys.resize(std::min(keys.size(), static_cast<size_t>(k)));
      if (wanted < segment.rows) bound[row] = std::min(bound[row], key);
    }
  }

  std::vector<uint64_t> nearest_live(const uint8_t* query, int64_t k) const {
    std::vector<uint64_t> heap;  // the worst kept key is in front
    uint16_t distance[kBlock];
    for_each_piece(0, total(), kBlock, [&](const uint8_t* codes, int64_t rows, int64_t first) {
      distances_(query, codes, rows, width_, distance);
      for (int64_t i = 0; i < rows; ++i) {
        const uint64_t key = make_key(distance[i], first + i);
        const bool full = static_cast<int64_t>(heap.size()) == k;
        if ((full && key >= heap.front()) || removed->has(first + i)) continue;
        if (full) {
          std::pop_heap(heap.begin(), heap.end());
          heap.pop_back();
        }
        heap.push_back(key);
        std::push_heap(heap.begin(), heap.end());
      }
    });
    std::sort_heap(heap.begin(), heap.end());
    return heap;
  }

  std::vector<uint64_t> within(const uint8_t* query, int64_t radius, int64_t begin, int64_t end) const {
    std::vector<uint64_t> keys;
    uint16_t distance[kBlock];
    uint16_t near[kBlock];
    for_each_piece(begin, end, kBlock, [&](const uint8_t* codes, int64_t rows, int64_t first) {
      distances_(query, codes, rows, width_, distance);
      int64_t count = 0;
      for (int64_t i = 0; i < rows; ++i) {
        near[count] = static_cast<uint16_t>(i);
        count += distance[i] <= radius;
      }
      for (int64_t i = 0; i < count; ++i)
        if (!removed->has(first + near[i])) keys.push_back(make_key(distance[near[i]], first + near[i]));
    });
    return keys;
  }

  int64_t width_;
  DistanceKernel distances_;
};

}  // namespace ragsr
