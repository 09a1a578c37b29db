// Search for the most alike patches of two maps on the CPU, free of torch: the plain form is in ragsr/ops/match.py.
//
// The inner product of two patches is a sum over the pixels in them, and neighbours share most of it. With G the inner
// products of single pixels, a the query and b the reference, i and j positions and d a step inside the patch,
//
//     T(i, j) = Σ_dx G(i + dx, j + dx)          along a row
//     S(i, j) = Σ_dy T(i + dy, j + dy) / |b_j|   along a column
//
// so that a pair of positions costs C multiplications and 2·patch additions instead of C·patch² multiplications.
//
//     row y of a ┐                                  ┌─────────── T(y)     ┐
//                ├─ multiply ─▶ G [X + p-1, W'] ──▶ │ ring of  T(y - 1)   ├─▶ S [X, W'] ─▶ the k largest so far
//     row y + δ  ┘              one pair of rows    └─ p slots  T(y - 2)  ┘   of row y - p+1
//     of b
//
// A task takes a band of rows and X columns of a, and all of b. It walks along the diagonals: for every δ down the rows
// of its band, so that each pair of rows is multiplied once and G, the ring and the operands stay in the second cache.
// δ rises, so every position of a meets the positions of b in the order of their index, and a strict comparison leaves
// equal scores to the lowest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "match_targets.h"

namespace ragsr {

// A map [channels, height, width], contiguous, and what is seen around it.
template <class T>
struct PatchMap {
  const T* data;
  int64_t channels, height, width, patch, padding;

  int64_t padded_height() const { return height + 2 * padding; }
  int64_t padded_width() const { return width + 2 * padding; }
  int64_t rows() const { return padded_height() - patch + 1; }  // positions of patches
  int64_t columns() const { return padded_width() - patch + 1; }
  bool has_row(int64_t padded) const { return padded >= padding && padded < padding + height; }
};


// ---------------------------------------------------------------- preparations

// The norm of every patch [rows, columns]. Sums are taken in double: they are cheap beside the search.
template <class T, class Parallel>
std::vector<T> patch_norms(const PatchMap<T>& map, const Parallel& parallel) {
  const int64_t width = map.padded_width(), columns = map.columns();
  std::vector<double> along(static_cast<size_t>(map.padded_height() * columns));
  parallel(map.height, [&](int64_t y) {
    std::vector<double> squares(static_cast<size_t>(width));
    for (int64_t c = 0; c < map.channels; ++c) {
      const T* row = map.data + (c * map.height + y) * map.width;
      double* to = squares.data() + map.padding;
      for (int64_t x = 0; x < map.width; ++x) to[x] += static_cast<double>(row[x]) * static_cast<double>(row[x]);
    }
    double* sums = along.data() + (y + map.padding) * columns;
    for (int64_t d = 0; d < map.patch; ++d)
      for (int64_t x = 0; x < columns; ++x) sums[x] += squares[static_cast<size_t>(x + d)];
  });
  std::vector<T> norms(static_cast<size_t>(map.rows() * columns));
  parallel(map.rows(), [&](int64_t y) {
    for (int64_t x = 0; x < columns; ++x) {
      double sum = 0;
      for (int64_t d = 0; d < map.patch; ++d) sum += along[static_cast<size_t>((y + d) * columns + x)];
      norms[static_cast<size_t>(y * columns + x)] = static_cast<T>(std::sqrt(sum));
    }
  });
  return norms;
}

// Row y of b, panel after panel. Columns beyond the map are zeros.
template <class T>
void pack_reference_row(const PatchMap<T>& map, int64_t y, const Layout& layout, T* to) {
  const int64_t columns = layout.padded_columns(map.width);
  for (int64_t first = 0; first < columns; first += 2 * layout.lanes) {
    const int64_t wide = std::min(2 * layout.lanes, columns - first);
    const int64_t real = std::min(wide, map.width - first);
    for (int64_t c = 0; c < map.channels; ++c, to += wide) {
      std::copy_n(map.data + (c * map.height + y) * map.width + first, real, to);
      std::fill(to + real, to + wide, T(0));
    }
  }
}

// `count` pixels of row y of a from padded column `first` on, tile after tile. What lies beside the map is zeros.
template <class T>
void pack_query_row(const PatchMap<T>& map, int64_t y, int64_t first, int64_t count, const Layout& layout, T* to) {
  const int64_t rows = layout.padded_rows(count);
  for (int64_t r = 0; r < rows;) {
    const int64_t tile = rows - r >= layout.tall ? layout.tall : layout.few;
    for (int64_t c = 0; c < map.channels; ++c) {
      const T* row = map.data + (c * map.height + y) * map.width;
      for (int64_t i = 0; i < tile; ++i) {
        const int64_t x = first + r + i - map.padding;
        *to++ = x >= 0 && x < map.width ? row[x] : T(0);
      }
    }
    r += tile;
  }
}

// b, ready to be searched.
template <class T>
struct PackedReference {
  std::vector<T> pixels;  // [height][panels]
  std::vector<T> scale;   // 1 / (norm + eps): [rows, scale_stride]
  int64_t row_length, scale_stride;

  template <class Parallel>
  PackedReference(const PatchMap<T>& map, T eps, const Layout& layout, const Parallel& parallel)
      : row_length(layout.padded_columns(map.width) * map.channels), scale_stride(layout.padded_columns(map.columns())) {
    pixels.resize(static_cast<size_t>(map.height * row_length));
    parallel(map.height, [&](int64_t y) { pack_reference_row(map, y, layout, pixels.data() + y * row_length); });
    const std::vector<T> norms = patch_norms(map, parallel);
    scale.resize(static_cast<size_t>(map.rows() * scale_stride));
    for (int64_t y = 0; y < map.rows(); ++y)
      for (int64_t x = 0; x < map.columns(); ++x)
        scale[static_cast<size_t>(y * scale_stride + x)] = 1 / (norms[static_cast<size_t>(y * map.columns() + x)] + eps);
  }
};

// ---------------------------------------------------------------- the k largest

// For every position of a task, sorted: highest first, of equal scores the earlier one.
template <class T>
class Largest {
 public:
  Largest(int64_t positions, int64_t k)
      : k_(k), scores_(static_cast<size_t>(positions * k), -std::numeric_limits<T>::infinity()),
        indices_(static_cast<size_t>(positions * k)) {
    for (size_t i = 0; i < indices_.size(); ++i) indices_[i] = static_cast<int64_t>(i) % k;
  }

  T bound(int64_t position) const { return scores_[static_cast<size_t>((position + 1) * k_ - 1)]; }
  const T* scores(int64_t position) const { return scores_.data() + position * k_; }
  const int64_t* indices(int64_t position) const { return indices_.data() + position * k_; }

  // Candidates first, first + 1, ...
  void offer(int64_t position, const T* candidates, int64_t count, int64_t first) {
    T* scores = scores_.data() + position * k_;
    int64_t* indices = indices_.data() + position * k_;
    for (int64_t x = 0; x < count; ++x) {
      if (!(candidates[x] > scores[k_ - 1])) continue;
      int64_t place = k_ - 1;
      for (; place > 0 && candidates[x] > scores[place - 1]; --place) {
        scores[place] = scores[place - 1];
        indices[place] = indices[place - 1];
      }
      scores[place] = candidates[x];
      indices[place] = first + x;
    }
  }

 private:
  int64_t k_;
  std::vector<T> scores_;
  std::vector<int64_t> indices_;
};

// Where the answer for one map goes: [positions of a, k].
template <class T>
struct MatchAnswer {
  T* score;
  int64_t* index;
  int64_t k;

  // What was found for the place `from` of a task, for this position, whose norm is divided by.
  void write(int64_t position, const Largest<T>& largest, int64_t from, T norm) const {
    std::copy_n(largest.indices(from), k, index + position * k);
    for (int64_t j = 0; j < k; ++j) score[position * k + j] = largest.scores(from)[j] / norm;
  }
};

// ---------------------------------------------------------------- a task

// Positions of a that are searched together.
struct Block {
  int64_t y, x, rows, columns;
};

template <class T>
class BlockSearch {
 public:
  BlockSearch(const SearchKernel<T>& kernel, const PatchMap<T>& a, const PatchMap<T>& b,
              const PackedReference<T>& packed, const Block& block, int64_t k)
      : kernel_(kernel), a_(a), b_(b), packed_(packed), block_(block), largest(block.rows * block.columns, k) {
    const Layout& layout = kernel.layout;
    pixels_ = block.columns + a.patch - 1;
    row_length_ = layout.padded_rows(pixels_) * a.channels;
    const int64_t left = layout.padded_columns(a.padding);  // so that the products are stored at whole vectors
    origin_ = left - b.padding;
    stride_ = 2 * left + layout.padded_columns(b.width);
    ring_stride_ = layout.padded_columns(b.columns());
    slot_ = block.columns * ring_stride_ + 2 * layout.lanes;  // the slots do not fall on the same lines of the cache
    queries_.resize(static_cast<size_t>((block.rows + a.patch - 1) * row_length_));
    for (int64_t y = block.y; y < block.y + block.rows + a.patch - 1; ++y)
      if (a.has_row(y)) pack_query_row(a, y - a.padding, block.x, pixels_, layout, query_row(y));
    g_.resize(static_cast<size_t>(layout.padded_rows(pixels_) * stride_ + 2 * layout.lanes));
    ring_.resize(static_cast<size_t>(a.patch * slot_));
    scores_.resize(static_cast<size_t>(ring_stride_));
    sums_.resize(static_cast<size_t>(a.patch));
  }

  void run() {
    const int64_t end = block_.y + block_.rows + a_.patch - 1;
    for (int64_t delta = 1 - end; delta < b_.padded_height() - block_.y; ++delta) {
      const int64_t first = std::max(block_.y, -delta), last = std::min(end, b_.padded_height() - delta);
      for (int64_t y = first; y < last && last - first >= a_.patch; ++y) {
        correlate_rows(y, y + delta);
        if (y - first >= a_.patch - 1) keep_largest(y - a_.patch + 1, y - a_.patch + 1 + delta);
      }
    }
  }

 private:
  T* query_row(int64_t y) { return queries_.data() + (y - block_.y) * row_length_; }
  T* slot(int64_t y) { return ring_.data() + y % a_.patch * slot_; }

  // T of the padded rows y of a and v of b.
  void correlate_rows(int64_t y, int64_t v) {
    if (!a_.has_row(y) || !b_.has_row(v)) {
      std::fill_n(slot(y), slot_, T(0));
      return;
    }
    const Layout& layout = kernel_.layout;
    kernel_.multiply(query_row(y), layout.padded_rows(pixels_),
                     packed_.pixels.data() + (v - b_.padding) * packed_.row_length,
                     layout.padded_columns(b_.width) / layout.lanes, a_.channels, g_.data() + origin_ + b_.padding,
                     stride_);
    kernel_.add_diagonals(g_.data() + origin_, stride_, a_.patch, block_.columns, b_.columns(), slot(y), ring_stride_);
  }

  // S of row y of the positions of a and row v of those of b.
  void keep_largest(int64_t y, int64_t v) {
    for (int64_t d = 0; d < a_.patch; ++d) sums_[static_cast<size_t>(d)] = slot(y + d);
    for (int64_t x = 0; x < block_.columns; ++x) {
      const T best = kernel_.score_row(sums_.data(), x * ring_stride_, a_.patch,
                                       packed_.scale.data() + v * packed_.scale_stride, b_.columns(), scores_.data());
      const int64_t position = (y - block_.y) * block_.columns + x;
      if (best > largest.bound(position)) largest.offer(position, scores_.data(), b_.columns(), v * b_.columns());
    }
  }

  const SearchKernel<T>& kernel_;
  const PatchMap<T>&a_, &b_;
  const PackedReference<T>& packed_;
  const Block block_;
  int64_t pixels_, row_length_, origin_, stride_, ring_stride_, slot_;
  std::vector<T> queries_, g_, ring_, scores_;
  std::vector<const T*> sums_;

 public:
  Largest<T> largest;
};

// ---------------------------------------------------------------- the whole

constexpr int64_t kCache = 384 << 10;  // bytes of G and the ring: of a second cache of 512 KiB or more
constexpr int64_t kWalk = 6 << 20;     // bytes of the rows of a band: of a thread's part of the third cache

inline int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Columns of a block: as many as the cache holds, at whole tiles.
template <class T>
int64_t block_columns(const PatchMap<T>& a, const PatchMap<T>& b, const Layout& layout) {
  const int64_t line = static_cast<int64_t>(sizeof(T)) * (a.patch + 1) * layout.padded_columns(b.padded_width());
  const int64_t tiles = std::max<int64_t>(1, (kCache / line + a.patch - 1) / layout.tall);
  return std::min(a.columns(), std::max<int64_t>(layout.few, tiles * layout.tall - (a.patch - 1)));
}

// Rows of a block: many, as a band multiplies patch - 1 rows that its neighbour multiplies too, but so few that what a
// walk reads is still in the third cache for the next one, and enough bands to occupy the threads.
template <class T>
int64_t block_rows(const PatchMap<T>& a, const PatchMap<T>& b, int64_t columns, int64_t threads) {
  constexpr int64_t kMost = 64, kTasks = 4;
  const int64_t row = static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(1, a.channels) * (columns + b.width);
  const int64_t most = std::min(kMost, kWalk / row);
  const int64_t least = 4 * (a.patch - 1);
  const int64_t bands = pieces(kTasks * threads, pieces(a.columns(), columns));
  return std::min(a.rows(), std::max<int64_t>({1, least, std::min(most, pieces(a.rows(), bands))}));
}

// The best matches of every patch of a in b; 1 <= k <= positions of b. `parallel(tasks, body)` calls body(task) for
// every task and returns when all are done, on up to `threads` threads.
template <class T, class Parallel>
void correlation_topk(const SearchKernel<T>& kernel, const PatchMap<T>& a, const PatchMap<T>& b, T eps,
                      const MatchAnswer<T>& answer, int64_t threads, const Parallel& parallel) {
  const PackedReference<T> packed(b, eps, kernel.layout, parallel);
  const std::vector<T> norms = patch_norms(a, parallel);
  const int64_t columns = block_columns(a, b, kernel.layout), across = pieces(a.columns(), columns);
  const int64_t rows = block_rows(a, b, columns, threads), down = pieces(a.rows(), rows);
  parallel(across * down, [&](int64_t task) {
    const int64_t y = task / across * rows, x = task % across * columns;
    const Block block{y, x, std::min(rows, a.rows() - y), std::min(columns, a.columns() - x)};
    BlockSearch<T> search(kernel, a, b, packed, block, answer.k);
    search.run();
    for (int64_t i = 0; i < block.rows * block.columns; ++i) {
      const int64_t position = (y + i / block.columns) * a.columns() + x + i % block.columns;
      answer.write(position, search.largest, i, norms[static_cast<size_t>(position)] + eps);
    }
  });
}

}  // namespace ragsr
