// The parts of cosine_gate and adain that work on a tile of tokens; free of torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"
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

constexpr int64_t kTogether = 4;

// Of every channel: the mean and the sum of squared deviations from it. Tiles are measured around their own first row
// and joined by Chan's rule, which keeps its digits when the mean is far larger than the deviation.
template <class W>
struct ChannelMoments {
  int64_t count;
  W* mean;
  W* squares;
};

// Of kTogether vectors of channels from `first`, whose sums stay in registers.
template <class W>
void measure_together(const TileRows<W>& tile, int64_t first, W* mean, W* squares) {
  using L = Lanes<W>;
  typename L::Vector origin[kTogether], sum[kTogether] = {}, square[kTogether] = {};
  for (int64_t j = 0; j < kTogether; ++j) origin[j] = L::load(tile[0] + first + j * L::count);
  for (int64_t i = 1; i < tile.count; ++i)
    for (int64_t j = 0; j < kTogether; ++j) sum[j] += L::load(tile[i] + first + j * L::count) - origin[j];
  for (int64_t j = 0; j < kTogether; ++j) origin[j] += sum[j] / static_cast<W>(tile.count);
  for (int64_t i = 0; i < tile.count; ++i)
    for (int64_t j = 0; j < kTogether; ++j) {
      const typename L::Vector away = L::load(tile[i] + first + j * L::count) - origin[j];
      square[j] += away * away;
    }
  for (int64_t j = 0; j < kTogether; ++j) L::store(mean + first + j * L::count, origin[j]);
  for (int64_t j = 0; j < kTogether; ++j) L::store(squares + first + j * L::count, square[j]);
}

template <class W>
void measure_channel(const TileRows<W>& tile, int64_t c, W* mean, W* squares) {
  W sum = 0, square = 0;
  for (int64_t i = 1; i < tile.count; ++i) sum += tile[i][c] - tile[0][c];
  mean[c] = tile[0][c] + sum / static_cast<W>(tile.count);
  for (int64_t i = 0; i < tile.count; ++i) square += (tile[i][c] - mean[c]) * (tile[i][c] - mean[c]);
  squares[c] = square;
}

template <class W>
void measure(const TileRows<W>& tile, int64_t channels, ChannelMoments<W>& to) {
  constexpr int64_t kWidth = kTogether * Lanes<W>::count;
  to.count = tile.count;
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) measure_together(tile, c, to.mean, to.squares);
  for (; c < channels; ++c) measure_channel(tile, c, to.mean, to.squares);
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
