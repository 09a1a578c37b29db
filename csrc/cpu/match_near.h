// Search for the most alike patches near where they are expected, on the CPU, free of torch: the plain form is in
// ragsr/ops/match_near.py.
//
// Windows of neighbours need not overlap, so nothing is shared between positions: each compares its patch with those of
// its own window, C·patch² multiplications a candidate. The maps lie pixel after pixel with the channels innermost, so
// that a row of a patch is one run of numbers:
//
//     patch of a, 3 runs of 3·C numbers      b     ──────[ · · · | · · · | · · · ]──────   one run, and a pixel further
//                                                  ──────[ · · · | · · · | · · · ]──────   that of the next candidate
//                                                  ──────[ · · · | · · · | · · · ]──────
#pragma once

#include "match.h"

namespace ragsr {

// A map as [padded height, padded width, channels] with zeros around it, and a vector more at the end.
template <class T, class Parallel>
std::vector<T> channels_innermost(const PatchMap<T>& map, const Layout& layout, const Parallel& parallel) {
  const int64_t row = map.padded_width() * map.channels;
  std::vector<T> pixels(static_cast<size_t>(map.padded_height() * row + layout.lanes));
  parallel(map.height, [&](int64_t y) {
    T* to = pixels.data() + (y + map.padding) * row + map.padding * map.channels;
    for (int64_t c = 0; c < map.channels; ++c) {
      const T* from = map.data + (c * map.height + y) * map.width;
      for (int64_t x = 0; x < map.width; ++x) to[x * map.channels + c] = from[x];
    }
  });
  return pixels;
}

// A reference, ready to be searched.
template <class T>
struct NearReference {
  PatchMap<T> map;
  std::vector<T> pixels, scale;  // scale [rows, columns]: 1 / (norm + eps)

  template <class Parallel>
  NearReference(const PatchMap<T>& map, T eps, const Layout& layout, const Parallel& parallel)
      : map(map), pixels(channels_innermost(map, layout, parallel)), scale(patch_norms(map, parallel)) {
    for (T& x : scale) x = 1 / (x + eps);
  }
};

// Where a match is expected: [positions of a, 3], the number of the reference, row and column. Any number is allowed.
struct Prior {
  const int64_t* data;
  int64_t window;
};

// Where the window around `centre` begins, once it is inside.
inline int64_t window_start(int64_t centre, int64_t window, int64_t length) {
  const int64_t inside = std::clamp<int64_t>(centre, 0, length - 1);
  return std::clamp<int64_t>(inside - window, 0, std::max<int64_t>(0, length - 2 * window - 1));
}

// The best matches of the patches of row y of a; `image` [positions, k] is where the numbers of references go.
template <class T>
void search_windows(const SearchKernel<T>& kernel, const PatchMap<T>& a, const std::vector<T>& pixels,
                    const std::vector<NearReference<T>>& references, const Prior& prior, int64_t y, int64_t k,
                    Largest<T>& largest, int64_t* image) {
  const int64_t length = a.patch * a.channels, run = kernel.layout.padded_columns(length);
  std::vector<T> patch(static_cast<size_t>(a.patch * run)), scores;
  for (int64_t x = 0; x < a.columns(); ++x) {
    for (int64_t d = 0; d < a.patch; ++d)
      std::copy_n(pixels.data() + ((y + d) * a.padded_width() + x) * a.channels, length, patch.data() + d * run);
    const int64_t* expected = prior.data + (y * a.columns() + x) * 3;
    const int64_t number = std::clamp<int64_t>(expected[0], 0, static_cast<int64_t>(references.size()) - 1);
    const NearReference<T>& b = references[static_cast<size_t>(number)];
    const int64_t rows = b.map.rows(), columns = b.map.columns(), row = b.map.padded_width() * a.channels;
    const int64_t top = window_start(expected[1], prior.window, rows), bottom = std::min(rows, top + 2 * prior.window + 1);
    const int64_t left = window_start(expected[2], prior.window, columns);
    const int64_t wide = std::min(columns, 2 * prior.window + 1);
    scores.resize(static_cast<size_t>(wide));
    for (int64_t v = top; v < bottom; ++v) {
      kernel.score_neighbours(patch.data(), b.pixels.data() + v * row + left * a.channels, row, a.channels, a.patch, run,
                              b.scale.data() + v * columns + left, wide, scores.data());
      largest.offer(x, scores.data(), wide, v * columns + left);
    }
    std::fill_n(image + (y * a.columns() + x) * k, k, number);
  }
}

// The best matches of every patch of a, each in the window around its prior; 1 <= k <= candidates of a window.
template <class T, class Parallel>
void correlation_topk_near(const SearchKernel<T>& kernel, const PatchMap<T>& a,
                           const std::vector<NearReference<T>>& references, const Prior& prior, T eps,
                           const MatchAnswer<T>& answer, int64_t* image, const Parallel& parallel) {
  const std::vector<T> pixels = channels_innermost(a, kernel.layout, parallel), norms = patch_norms(a, parallel);
  parallel(a.rows(), [&](int64_t y) {
    Largest<T> largest(a.columns(), answer.k);
    search_windows(kernel, a, pixels, references, prior, y, answer.k, largest, image);
    for (int64_t x = 0; x < a.columns(); ++x)
      answer.write(y * a.columns() + x, largest, x, norms[static_cast<size_t>(y * a.columns() + x)] + eps);
  });
}

}  // namespace ragsr
