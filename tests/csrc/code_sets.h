// Sets of codes that are hard on a search, and the answer by sorting all distances.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace code_sets {

inline std::mt19937 generator(1);

enum Kind { kRandom, kEqual, kOneDistance, kDuplicates, kClusters, kLight, kApproaching, kKinds };

// Exactly as large as the bytes, so that a sanitizer sees one byte too many.
using Bytes = std::unique_ptr<uint8_t[]>;

inline Bytes make_codes(Kind kind, int64_t n, int64_t width) {
  Bytes codes(new uint8_t[static_cast<size_t>(n * width)]);
  const auto random = [] { return static_cast<uint8_t>(generator()); };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      uint8_t& byte = codes[static_cast<size_t>(i * width + j)];
      const auto at = static_cast<size_t>(j);
      if (kind == kRandom) byte = random();
      if (kind == kEqual) byte = 0x5a;
      if (kind == kOneDistance) byte = j == i % width ? static_cast<uint8_t>(1 << i % 8) : 0;
      if (kind == kDuplicates) byte = i < 7 ? random() : codes[static_cast<size_t>(i % 7 * width) + at];
      if (kind == kClusters) byte = static_cast<uint8_t>((i % 2 ? 0xff : 0) ^ (generator() % 16 ? 0 : random()));
      if (kind == kLight) byte = random() & random() & random();
      if (kind == kApproaching) byte = 8 * width * i / n > 8 * j ? 0 : 0xff;  // later codes are nearer to 0
    }
  }
  return codes;
}

using Neighbour = std::pair<int32_t, int64_t>;  // distance, index

inline std::vector<Neighbour> nearest(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width, int64_t k) {
  std::vector<Neighbour> all;
  for (int64_t i = 0; i < n; ++i) {
    int distance = 0;
    for (int64_t j = 0; j < width; ++j) distance += __builtin_popcount(query[j] ^ codes[i * width + j]);
    all.emplace_back(distance, i);
  }
  std::partial_sort(all.begin(), all.begin() + k, all.end());
  all.resize(static_cast<size_t>(k));
  return all;
}

}  // namespace code_sets
