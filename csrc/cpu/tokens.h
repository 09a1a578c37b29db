// Features [tokens, channels] in memory of any strides, read and written a tile of tokens at a time; free of torch.
//
// A tile is computed on in rows of float (double for double). Rows of that type that lie densely are read in place; any
// others go through a room that stays in the cache: half types, the channels-first layout of images, and gaps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "half.h"

namespace ragsr {

constexpr int64_t kTileTokens = 64;

inline int64_t tiles_of(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

template <class T>
struct Tokens {
  T* data;
  int64_t tokens, channels, token_stride, channel_stride;
};

template <class W>
struct TileRows {
  const W* data;
  int64_t count, stride;
  const W* operator[](int64_t i) const { return data + i * stride; }
};

// Rows of tile `tile`; `room` has kTileTokens x channels places. Sixteen channels at a time, so that in the
// channels-first layout both what is read and what is written lies together.
template <class T>
TileRows<Wide<T>> read_tile(const Tokens<const T>& x, int64_t tile, Wide<T>* room) {
  constexpr int64_t kChannels = 16;
  const int64_t first = tile * kTileTokens, count = std::min(kTileTokens, x.tokens - first), channels = x.channels;
  const T* from = x.data + first * x.token_stride;
  if constexpr (std::is_same_v<T, Wide<T>>)
    if (x.channel_stride == 1) return {from, count, x.token_stride};
  if (x.channel_stride == 1) {
    for (int64_t i = 0; i < count; ++i) widen(from + i * x.token_stride, 1, channels, room + i * channels);
    return {room, count, channels};
  }
  Wide<T> piece[kChannels][kTileTokens];
  for (int64_t begin = 0; begin < channels; begin += kChannels) {
    const int64_t width = std::min(kChannels, channels - begin);
    for (int64_t c = 0; c < width; ++c) widen(from + (begin + c) * x.channel_stride, x.token_stride, count, piece[c]);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; ++c) room[i * channels + begin + c] = piece[c][i];
  }
  return {room, count, channels};
}

// f(element, channel) for every channel of a token, in a loop of its own where they lie densely: that one takes vectors.
template <class T, class F>
void each_channel(const Tokens<T>& x, int64_t token, const F& f) {
  T* row = x.data + token * x.token_stride;
  if (x.channel_stride == 1) {
    for (int64_t c = 0; c < x.channels; ++c) f(row[c], c);
  } else {
    for (int64_t c = 0; c < x.channels; ++c) f(row[c * x.channel_stride], c);
  }
}

template <class T>
void write_row(const Tokens<T>& out, int64_t token, const Wide<T>* row) {
  narrow(row, out.channels, out.data + token * out.token_stride, out.channel_stride);
}

}  // namespace ragsr
