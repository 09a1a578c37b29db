// Σ_r g_r · O_r beside (1 − Σ_r g_r) · O_own, a tile of tokens and one reference at a time; free of torch.
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

// 1 − Σ_r g_r
template <class W, class G>
W own_share(const Gates<G>& gates, int64_t token) {
  W total = 0;
  for (int64_t r = 0; r < gates.references; ++r) total += static_cast<W>(gates.at(r, token));
  return 1 - total;
}

// The rows of a tile as the first reference finds them: fused = (1 − Σ_r g_r) · own + g_0 · other
template <class W, class G>
void start_blend(const TileRows<W>& own, const TileRows<W>& other, const Gates<G>& gates, int64_t tile,
                 const Tokens<W>& fused) {
  for (int64_t i = 0; i < own.count; ++i) {
    const int64_t token = tile * kTileTokens + i;
    const W kept = own_share<W>(gates, token), taken = static_cast<W>(gates.at(0, token));
    const W *a = own[i], *b = other[i];
    each_channel(fused, token, [=](W& to, int64_t c) { to = kept * a[c] + taken * b[c]; });
  }
}

// What every further reference adds: fused += g_r · other
template <class W, class G>
void add_reference(const TileRows<W>& other, const Gates<G>& gates, int64_t reference, int64_t tile,
                   const Tokens<W>& fused) {
  for (int64_t i = 0; i < other.count; ++i) {
    const int64_t token = tile * kTileTokens + i;
    const W taken = static_cast<W>(gates.at(reference, token));
    const W* b = other[i];
    each_channel(fused, token, [=](W& to, int64_t c) { to += taken * b[c]; });
  }
}

}  // namespace ragsr
