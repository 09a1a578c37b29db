// (1 − Σ_r g_r) · O_own + Σ_r g_r · O_r over a tile of tokens; free of torch.
#pragma once

#include <cstdint>

#include "tokens.h"

namespace ragsr {

// The gates of one image [references, tokens].
template <class G>
struct Gates {
  const G* data;
  int64_t references, tokens, reference_stride, token_stride;

  G at(int64_t reference, int64_t token) const { return data[reference * reference_stride + token * token_stride]; }
};

// Whether any gate is not 0.
template <class G>
bool any_open(const Gates<G>& gates) {
  for (int64_t r = 0; r < gates.references; ++r)
    for (int64_t i = 0; i < gates.tokens; ++i)
      if (!(static_cast<Wide<G>>(gates.at(r, i)) == 0)) return true;
  return false;
}

// sum [count, channels] = (1 − Σ_r g_r) · own
template <class W, class G>
void start_blend(const TileRows<W>& own, const Gates<G>& gates, int64_t tile, int64_t channels, W* sum) {
  for (int64_t i = 0; i < own.count; ++i) {
    W total = 0;
    for (int64_t r = 0; r < gates.references; ++r) total += static_cast<W>(gates.at(r, tile * kTileTokens + i));
    const W weight = 1 - total;
    for (int64_t c = 0; c < channels; ++c) sum[i * channels + c] = weight * own[i][c];
  }
}

// sum += g_r · other
template <class W, class G>
void add_reference(const TileRows<W>& other, const Gates<G>& gates, int64_t reference, int64_t tile, int64_t channels,
                   W* sum) {
  for (int64_t i = 0; i < other.count; ++i) {
    const auto weight = static_cast<W>(gates.at(reference, tile * kTileTokens + i));
    for (int64_t c = 0; c < channels; ++c) sum[i * channels + c] += weight * other[i][c];
  }
}

}  // namespace ragsr
