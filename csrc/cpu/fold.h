// Texture transfer on the CPU, free of torch: the plain form is in ragsr/ops/fold.py.
//
// For each t of [-m, m]² the output cell g reads the cell r(g + t) - t of the features. The matches r are taken apart
// into rows and columns once; then every channel is a gather with the same places. Sums run over t in the order of the
// plain form. The backward is the same walk with the arrows turned round: every channel belongs to one task, which adds
// in that order, so the result has the same bits on every run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ragsr {

// Cells of the output [h, w] and of the features [rows, columns]; a cell is stride × stride pixels, m = side / 2.
struct Fold {
  int64_t h, w, rows, columns, stride, side;

  int64_t width() const { return w * stride; }            // of the output, in pixels
  int64_t source_width() const { return columns * stride; }
  int64_t pixels() const { return h * stride * width(); }
  int64_t source_pixels() const { return rows * stride * source_width(); }
};

// r as rows and columns, [h, w] each.
struct Matches {
  std::vector<int32_t> y, x;

  // False if an index lies outside the features.
  bool read(const int64_t* index, const Fold& fold) {
    const int64_t cells = fold.h * fold.w, sources = fold.rows * fold.columns;
    y.resize(static_cast<size_t>(cells));
    x.resize(static_cast<size_t>(cells));
    for (int64_t i = 0; i < cells; ++i) {
      if (index[i] < 0 || index[i] >= sources) return false;
      y[static_cast<size_t>(i)] = static_cast<int32_t>(index[i] / fold.columns);
      x[static_cast<size_t>(i)] = static_cast<int32_t>(index[i] % fold.columns);
    }
    return true;
  }
};

// Where the cells of row `row` read for t = (ty, tx): the first pixel of the source cell, or -1, for each of w cells.
inline void find_sources(const Fold& fold, const Matches& matches, int64_t row, int64_t ty, int64_t tx, int64_t* source) {
  std::fill_n(source, fold.w, int64_t{-1});
  if (row + ty < 0 || row + ty >= fold.h) return;
  const int32_t* r_y = matches.y.data() + (row + ty) * fold.w;
  const int32_t* r_x = matches.x.data() + (row + ty) * fold.w;
  for (int64_t g = std::max<int64_t>(0, -tx); g < std::min(fold.w, fold.w - tx); ++g) {
    const int64_t y = r_y[g + tx] - ty, x = r_x[g + tx] - tx;
    const bool inside = y >= 0 && y < fold.rows && x >= 0 && x < fold.columns;
    if (inside) source[g] = (y * fold.source_width() + x) * fold.stride;
  }
}

// The same for every t: [side²][w].
inline void find_all_sources(const Fold& fold, const Matches& matches, int64_t row, int64_t* sources) {
  const int64_t m = fold.side / 2;
  for (int64_t ty = -m; ty <= m; ++ty)
    for (int64_t tx = -m; tx <= m; ++tx, sources += fold.w) find_sources(fold, matches, row, ty, tx, sources);
}

// One row of cells of one channel: out [stride, width] from features [source pixels]. `sum` has room for [stride, width].
// S is the stride, or 0 where it is known only at run time.
template <class T, class Wide, int S>
void gather_row(const Fold& fold, const int64_t* sources, const T* features, Wide* sum, T* out) {
  const int64_t s = S ? S : fold.stride, width = fold.w * s, source_width = fold.columns * s;
  const int64_t parts = fold.side * fold.side;
  std::fill_n(sum, s * width, Wide(0));
  for (int64_t t = 0; t < parts; ++t, sources += fold.w)
    for (int64_t g = 0; g < fold.w; ++g) {
      if (sources[g] < 0) continue;
      const T* from = features + sources[g];
      for (int64_t y = 0; y < s; ++y)
        for (int64_t x = 0; x < s; ++x) sum[y * width + g * s + x] += static_cast<Wide>(from[y * source_width + x]);
    }
  for (int64_t i = 0; i < s * width; ++i) out[i] = static_cast<T>(sum[i] / static_cast<Wide>(parts));
}

// One row of cells of one channel, back: adds grad [stride, width] into total [source pixels].
template <class T, class Wide, int S>
void scatter_row(const Fold& fold, const int64_t* sources, const T* grad, Wide* total) {
  const int64_t s = S ? S : fold.stride, width = fold.w * s, source_width = fold.columns * s;
  const int64_t parts = fold.side * fold.side;
  for (int64_t t = 0; t < parts; ++t, sources += fold.w)
    for (int64_t g = 0; g < fold.w; ++g) {
      if (sources[g] < 0) continue;
      Wide* to = total + sources[g];
      for (int64_t y = 0; y < s; ++y)
        for (int64_t x = 0; x < s; ++x) to[y * source_width + x] += static_cast<Wide>(grad[y * width + g * s + x]);
    }
}

// Channels of a task: they share the search for the sources, and their planes the second cache.
constexpr int64_t kTogether = 8;

// out [channels, h·stride, w·stride] from features [channels, rows·stride, columns·stride]
template <class T, class Wide, class Parallel>
void gather_fold(const Fold& fold, const Matches& matches, const T* features, int64_t channels, T* out,
                 const Parallel& parallel) {
  constexpr int64_t kBand = 16;  // rows of cells of a task
  const auto gather = fold.stride == 1   ? gather_row<T, Wide, 1>
                      : fold.stride == 2 ? gather_row<T, Wide, 2>
                      : fold.stride == 4 ? gather_row<T, Wide, 4>
                                         : gather_row<T, Wide, 0>;
  const int64_t bands = (fold.h + kBand - 1) / kBand;
  parallel((channels + kTogether - 1) / kTogether * bands, [&](int64_t task) {
    const int64_t first = task / bands * kTogether, top = task % bands * kBand;
    std::vector<int64_t> sources(static_cast<size_t>(fold.side * fold.side * fold.w));
    std::vector<Wide> sum(static_cast<size_t>(fold.stride * fold.width()));
    for (int64_t row = top; row < std::min(fold.h, top + kBand); ++row) {
      find_all_sources(fold, matches, row, sources.data());
      for (int64_t c = first; c < std::min(channels, first + kTogether); ++c)
        gather(fold, sources.data(), features + c * fold.source_pixels(), sum.data(),
               out + c * fold.pixels() + row * fold.stride * fold.width());
    }
  });
}

// grad_features [channels, rows·stride, columns·stride] from grad [channels, h·stride, w·stride]
template <class T, class Wide, class Parallel>
void gather_fold_backward(const Fold& fold, const Matches& matches, const T* grad, int64_t channels, T* grad_features,
                          const Parallel& parallel) {
  const auto scatter = fold.stride == 1   ? scatter_row<T, Wide, 1>
                       : fold.stride == 2 ? scatter_row<T, Wide, 2>
                       : fold.stride == 4 ? scatter_row<T, Wide, 4>
                                          : scatter_row<T, Wide, 0>;
  const auto parts = static_cast<Wide>(fold.side * fold.side);
  parallel((channels + kTogether - 1) / kTogether, [&](int64_t task) {
    const int64_t first = task * kTogether, count = std::min(kTogether, channels - first);
    std::vector<int64_t> sources(static_cast<size_t>(fold.side * fold.side * fold.w));
    std::vector<Wide> total(static_cast<size_t>(count * fold.source_pixels()));
    for (int64_t row = 0; row < fold.h; ++row) {
      find_all_sources(fold, matches, row, sources.data());
      for (int64_t c = 0; c < count; ++c)
        scatter(fold, sources.data(), grad + (first + c) * fold.pixels() + row * fold.stride * fold.width(),
                total.data() + c * fold.source_pixels());
    }
    std::transform(total.begin(), total.end(), grad_features + first * fold.source_pixels(),
                   [&](Wide x) { return static_cast<T>(x / parts); });
  });
}

}  // namespace ragsr
