// Codes of 8 and 16 bits: the table with the answer to every possible query (hamming_cube.h), and the tables of the
// galleries that were searched last.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "hamming_kernels.h"
#include "hamming_nearest.h"

namespace ragsr {

inline int64_t power_of_two_from(int64_t k) {
  int64_t power = 1;
  while (power < k) power *= 2;
  return power;
}

// What a call costs with and without a table, in nanoseconds of one thread; only their order matters. Scanning and merging
// were fitted on Zen 4 with AVX-512 to 1000, 26,500 and 300,000 codes, k = 1, 4, 16, 100 and 1 to 64 queries, best of 15;
// inserting, comparing and looking up are estimates. Lists of more than 16
// entries leave the registers. With few queries each code is counted, with many the planes are added.
struct TableCosts {
  double build, scan, look_up;

  TableCosts(int64_t q, int64_t n, int64_t width, int64_t k) {
    const auto queries = static_cast<double>(q), codes = static_cast<double>(n), kept = static_cast<double>(k);
    const auto bits = static_cast<double>(8 * width), cells = static_cast<double>(int64_t{1} << 8 * width);
    const auto entries = cells * static_cast<double>(power_of_two_from(k));
    build = 1000 + codes * (k == 1 ? 1 : 7) + entries * bits * (k <= 16 ? 0.09 : 1.1);
    scan = queries * (100 + codes * (q < 12 ? 0.07 : 0.006) + 18 * kept * (1 + std::log(codes / kept)));
    look_up = 200 + 0.04 * codes * static_cast<double>(width) + queries * kept;  // compares the codes first
  }

  double saved() const { return scan - look_up; }
};

// The sorted lists of k codes of every cell. Never changes once it is built.
class CubeTable {
 public:
  static bool possible(int64_t n, int64_t width, int64_t k) {
    return width <= 2 && k <= kCubeLargestK && n < int64_t{1} << kCubeIndexBits;
  }

  template <class Parallel>
  CubeTable(const CpuKernel& kernel, const uint8_t* codes, int64_t n, int64_t width, int64_t k,
            const Parallel& parallel)
      : width_(width), k_(power_of_two_from(k)), lanes_(kernel.cells) {
    constexpr int64_t kParts = 16;
    constexpr uint32_t kNobody = uint32_t{17} << kCubeIndexBits;  // further away than any code
    const int64_t cells = int64_t{1} << 8 * width;
    room_.assign(static_cast<size_t>(cells * k_ + 16), kNobody);
    struct alignas(64) Line { uint32_t entry[16]; };
    table_ = aligned<Line>(room_.data())->entry;
    insert(codes, n);
    const int64_t passes = divide_up(log2_of(cells / lanes_), cube_pass_bits(k_));
    for (int pass = 0; pass < passes; ++pass)
      parallel(kParts, [&](int64_t part) { kernel.cube_pass(table_, cells, k_, pass, part, kParts); });
  }
  CubeTable(const CubeTable&) = delete;
  CubeTable& operator=(const CubeTable&) = delete;

  int64_t k() const { return k_; }  // it answers every smaller k as well
  int64_t bytes() const { return 4 * static_cast<int64_t>(room_.size()); }

  template <class Parallel>
  void look_up(const uint8_t* queries, int64_t q, const Answer& answer, const Parallel& parallel) const {
    constexpr int64_t kRows = 4096;
    constexpr uint32_t kIndex = (uint32_t{1} << kCubeIndexBits) - 1;
    parallel(divide_up(q, kRows), [&](int64_t task) {
      for (int64_t i = task * kRows; i < std::min(q, (task + 1) * kRows); ++i) {
        const int64_t cell = cell_of(queries, i);
        const uint32_t* list = table_ + cell / lanes_ * k_ * lanes_ + cell % lanes_;
        for (int64_t j = 0; j < answer.k; ++j) {
          const uint32_t entry = list[j * lanes_];
          answer.distance[i * answer.k + j] = static_cast<int32_t>(entry >> kCubeIndexBits);
          answer.index[i * answer.k + j] = entry & kIndex;
        }
      }
    });
  }

 private:
  int64_t cell_of(const uint8_t* codes, int64_t i) const {
    return static_cast<int64_t>(width_ == 1 ? codes[i] : load_as<uint16_t>(codes + 2 * i));
  }

  // The first k codes of every cell, in the order of their index.
  void insert(const uint8_t* codes, int64_t n) {
    if (k_ == 1) {  // the last that is written is the first; a list is one entry
      for (int64_t i = n - 1; i >= 0; --i) table_[cell_of(codes, i)] = static_cast<uint32_t>(i);
      return;
    }
    std::vector<uint8_t> filled(size_t{1} << 8 * width_);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t cell = cell_of(codes, i);
      uint8_t& entries = filled[static_cast<size_t>(cell)];
      if (entries == k_) continue;
      const int64_t list = cell / lanes_ * k_ + entries++;
      table_[list * lanes_ + cell % lanes_] = static_cast<uint32_t>(i);
    }
  }

  int64_t width_, k_, lanes_;
  std::vector<uint32_t> room_;
  uint32_t* table_;
};

// The tables of the galleries searched last. Any number of threads may ask at once.
//
// A gallery is known by its bytes: they are copied when its table is built and compared before every use, so a gallery
// may be overwritten in place between two calls. Before there is a table, calls scan, and what it would have saved them
// is added up; when that reaches the cost of building, it is built. So nobody pays more than twice what they would have,
// had they known how many calls were to come.
class TableCache {
 public:
  static constexpr int64_t kMostBytes = int64_t{64} << 20;    // of all tables and copies
  static constexpr int64_t kLargestCodes = int64_t{4} << 20;  // bytes; comparing longer ones takes longer than it saves

  using Table = std::shared_ptr<const CubeTable>;

  // The table to answer from, or null where a scan is better. `build()` makes a new one.
  template <class Build>
  Table find_or_build(const uint8_t* codes, int64_t n, int64_t width, int64_t k, const TableCosts& costs,
                      const Build& build) {
    const bool kept = n * width <= kLargestCodes;
    if (kept && costs.saved() > 0)
      if (Table table = find(codes, n, width, k)) return table;
    if (costs.build >= costs.scan && !(kept && earned(codes, n, width, costs))) return nullptr;
    Table table = build();
    if (kept) keep(codes, n, width, table);
    return table;
  }

 private:
  struct Gallery {
    int64_t width;
    std::vector<uint8_t> codes;
    Table table;

    bool is(const uint8_t* other, int64_t n, int64_t of_width) const {
      return width == of_width && static_cast<int64_t>(codes.size()) == n * width &&
             std::memcmp(codes.data(), other, codes.size()) == 0;
    }
    int64_t bytes() const { return static_cast<int64_t>(codes.size()) + table->bytes(); }
  };

  // What a table would have saved. A few of its bytes name the gallery: a mistake here costs time, not truth.
  struct Account {
    uint64_t name = 0;
    double saved = 0;
  };

  static uint64_t name_of(const uint8_t* codes, int64_t n, int64_t width) {
    constexpr int64_t kSamples = 16;
    const int64_t bytes = n * width, word = std::min<int64_t>(8, bytes);
    uint64_t name = static_cast<uint64_t>(2 * n + width);
    for (int64_t i = 0; i < kSamples; ++i)
      name = name * 0x9e3779b97f4a7c15u + load_word(codes + (bytes - word) * i / (kSamples - 1), word);
    return name;
  }

  Table find(const uint8_t* codes, int64_t n, int64_t width, int64_t k) {
    std::vector<std::shared_ptr<const Gallery>> galleries;
    {
      const std::lock_guard<std::mutex> lock(guard_);
      galleries = galleries_;
    }
    for (const auto& gallery : galleries) {
      if (gallery->table->k() < k || !gallery->is(codes, n, width)) continue;
      if (gallery != galleries.front()) move_to_front(gallery);
      return gallery->table;
    }
    return nullptr;
  }

  void move_to_front(const std::shared_ptr<const Gallery>& gallery) {
    const std::lock_guard<std::mutex> lock(guard_);
    const auto at = std::find(galleries_.begin(), galleries_.end(), gallery);
    if (at != galleries_.end()) std::rotate(galleries_.begin(), at, at + 1);
  }

  // Whether a table is paid for. Who hears yes builds it; the others go on as before.
  bool earned(const uint8_t* codes, int64_t n, int64_t width, const TableCosts& costs) {
    if (costs.saved() <= 0) return false;
    const uint64_t name = name_of(codes, n, width);
    const std::lock_guard<std::mutex> lock(guard_);
    Account* account = std::find_if(accounts_, accounts_ + kAccounts, [&](const Account& a) { return a.name == name; });
    if (account == accounts_ + kAccounts) {
      account = &accounts_[oldest_++ % kAccounts];
      *account = {name, 0};
    }
    account->saved += costs.saved();
    if (account->saved < costs.build) return false;
    account->saved = 0;
    return true;
  }

  void keep(const uint8_t* codes, int64_t n, int64_t width, const Table& table) {
    auto gallery = std::make_shared<Gallery>(Gallery{width, {codes, codes + n * width}, table});
    const std::lock_guard<std::mutex> lock(guard_);
    const auto replaced = [&](const auto& old) { return old->table->k() <= table->k() && old->is(codes, n, width); };
    galleries_.erase(std::remove_if(galleries_.begin(), galleries_.end(), replaced), galleries_.end());
    galleries_.insert(galleries_.begin(), std::move(gallery));
    int64_t bytes = 0;
    size_t number = 0;
    while (number < galleries_.size() && (bytes += galleries_[number]->bytes()) <= kMostBytes) ++number;
    galleries_.resize(number);
  }

  static constexpr size_t kAccounts = 16;

  std::mutex guard_;
  std::vector<std::shared_ptr<const Gallery>> galleries_;  // the last used in front
  Account accounts_[kAccounts];
  size_t oldest_ = 0;
};

inline TableCache& table_cache() {
  static auto* cache = new TableCache;  // never destroyed: threads may still search while the process ends
  return *cache;
}

}  // namespace ragsr
