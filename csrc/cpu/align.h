// AdaIN over many matrices [tokens, channels]: measure every tile, join the tiles of a matrix in their order, then
// write (x − μ_x) / σ_x · σ_style + μ_style. Free of torch; where the rows of a tile come from is the caller's affair.
#pragma once

#include <vector>

#include "gate.h"

namespace ragsr {

// The moments of all tiles of all matrices, in one piece of memory.
template <class W>
class TileMoments {
 public:
  TileMoments(int64_t matrices, int64_t tiles, int64_t channels)
      : tiles_(tiles), channels_(channels), values_(static_cast<size_t>(2 * matrices * tiles * channels)),
        moments_(static_cast<size_t>(matrices * tiles)) {
    for (size_t i = 0; i < moments_.size(); ++i) {
      W* mean = values_.data() + 2 * i * static_cast<size_t>(channels);
      moments_[i] = {0, mean, mean + channels};
    }
  }

  ChannelMoments<W>& of(int64_t matrix, int64_t tile) { return moments_[static_cast<size_t>(matrix * tiles_ + tile)]; }

  // Into the first tile, which then holds those of the whole matrix.
  void join_tiles(int64_t matrix) {
    for (int64_t tile = 1; tile < tiles_; ++tile) join(of(matrix, 0), of(matrix, tile), channels_);
  }

 private:
  int64_t tiles_, channels_;
  std::vector<W> values_;
  std::vector<ChannelMoments<W>> moments_;
};

// out = (x − from) · factor + to
template <class W>
void move_row(const W* x, const W* from, const W* factor, const W* to, int64_t channels, W* out) {
  using L = Lanes<W>;
  int64_t c = 0;
  for (; c + L::count <= channels; c += L::count)
    L::store(out + c, (L::load(x + c) - L::load(from + c)) * L::load(factor + c) + L::load(to + c));
  for (; c < channels; ++c) out[c] = (x[c] - from[c]) * factor[c] + to[c];
}

// x(matrix, tile, room) and style(matrix, tile, room) give the rows of a tile, out(matrix) where the result goes.
// `parallel(tasks, body)` calls body(begin, end) for parts of [0, tasks).
template <class W, class X, class Style, class Out, class Parallel>
void align(int64_t matrices, int64_t tokens, int64_t style_tokens, int64_t channels, const X& x, const Style& style,
           const Out& out, const Parallel& parallel) {
  const int64_t tiles = tiles_of(tokens), style_tiles = tiles_of(style_tokens);
  TileMoments<W> found(matrices, tiles, channels), wanted(matrices, style_tiles, channels);
  const auto room = [&](int64_t rows) { return std::vector<W>(static_cast<size_t>(rows * channels)); };
  parallel(matrices * tiles, [&](int64_t begin, int64_t end) {
    std::vector<W> rows = room(kTileTokens);
    for (int64_t i = begin; i < end; ++i)
      measure(x(i / tiles, i % tiles, rows.data()), channels, found.of(i / tiles, i % tiles));
  });
  parallel(matrices * style_tiles, [&](int64_t begin, int64_t end) {
    std::vector<W> rows = room(kTileTokens);
    for (int64_t i = begin; i < end; ++i)
      measure(style(i / style_tiles, i % style_tiles, rows.data()), channels,
              wanted.of(i / style_tiles, i % style_tiles));
  });
  for (int64_t matrix = 0; matrix < matrices; ++matrix) {
    found.join_tiles(matrix);
    wanted.join_tiles(matrix);
  }
  parallel(matrices * tiles, [&](int64_t begin, int64_t end) {
    std::vector<W> rows = room(kTileTokens), factor = room(1), row = room(1);
    for (int64_t i = begin; i < end; ++i) {
      const ChannelMoments<W>&from = found.of(i / tiles, 0), &to = wanted.of(i / tiles, 0);
      for (int64_t c = 0; c < channels; ++c) factor[c] = deviation(to, c) / deviation(from, c);
      const TileRows<W> tile = x(i / tiles, i % tiles, rows.data());
      const auto target = out(i / tiles);
      for (int64_t j = 0; j < tile.count; ++j) {
        move_row(tile[j], from.mean, factor.data(), to.mean, channels, row.data());
        write_row(target, i % tiles * kTileTokens + j, row.data());
      }
    }
  });
}

}  // namespace ragsr
