// The parts of cosine_gate and adain that work on a tile of tokens; free of torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "sums.h"
#include "tokens.h"

namespace ragsr {

// ---------------------------------------------------------------- gate

// sum [channels] of x̂ over the tile
template <class W>
void sum_directions(const TileRows<W>& tile, int64_t channels, W* sum) {
  std::fill_n(sum, channels, W(0));
  for (int64_t i = 0; i < tile.count; ++i) {
    const W* x = tile[i];
    const W inverse = 1 / norm(x, channels);
    for (int64_t c = 0; c < channels; ++c) sum[c] += x[c] * inverse;
  }
}

// (m − min m) / (max m − min m + 1e-8) in place; 0 where the range says nothing, NaN where one is NaN
template <class W>
void stretch(W* m, int64_t n) {
  constexpr W kFlat = W(1e-6), kEps = W(1e-8);
  W low = m[0], high = m[0];
  for (int64_t i = 1; i < n; ++i) {
    low = m[i] < low || m[i] != m[i] ? m[i] : low;
    high = m[i] > high ? m[i] : high;
    if (low != low) break;
  }
  const W spread = high - low;
  for (int64_t i = 0; i < n; ++i) m[i] = spread <= kFlat ? W(0) : (m[i] - low) / (spread + kEps);
}

// ---------------------------------------------------------------- moments

// Of every channel: the mean and the sum of squared deviations from it. Tiles are measured around their own first row
// and joined by Chan's rule, which keeps its digits when the mean is far larger than the deviation.
template <class W>
struct ChannelMoments {
  int64_t count;
  W* mean;
  W* squares;
};

template <class W>
void measure(const TileRows<W>& tile, int64_t channels, ChannelMoments<W>& to) {
  to.count = tile.count;
  std::fill_n(to.mean, channels, W(0));
  std::fill_n(to.squares, channels, W(0));
  const W* origin = tile[0];
  for (int64_t i = 1; i < tile.count; ++i)
    for (int64_t c = 0; c < channels; ++c) to.mean[c] += tile[i][c] - origin[c];
  for (int64_t c = 0; c < channels; ++c) to.mean[c] = origin[c] + to.mean[c] / static_cast<W>(tile.count);
  for (int64_t i = 0; i < tile.count; ++i) {
    const W* x = tile[i];
    for (int64_t c = 0; c < channels; ++c) to.squares[c] += (x[c] - to.mean[c]) * (x[c] - to.mean[c]);
  }
}

template <class W>
void join(ChannelMoments<W>& into, const ChannelMoments<W>& other, int64_t channels) {
  const int64_t count = into.count + other.count;
  const W share = static_cast<W>(other.count) / static_cast<W>(count);
  const W weight = share * static_cast<W>(into.count);
  for (int64_t c = 0; c < channels; ++c) {
    const W step = other.mean[c] - into.mean[c];
    into.mean[c] += step * share;
    into.squares[c] += other.squares[c] + step * step * weight;
  }
  into.count = count;
}

template <class W>
W deviation(const ChannelMoments<W>& of, int64_t channel) {
  return std::sqrt(of.squares[channel] / static_cast<W>(of.count > 1 ? of.count - 1 : 1) + W(1e-5));
}

}  // namespace ragsr
