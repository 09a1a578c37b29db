// cosine_gate, adain and gated_blend for CPU tensors. The kernels stand in gate.h and align.h.
#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "align.h"
#include "matrices.h"

namespace ragsr {
namespace {

// ---------------------------------------------------------------- cosine_gate

// The mean of x̂ over the tokens of one reference: summed tile by tile, then over the tiles in their order.
template <class T>
void mean_direction(const Tokens<const T>& x, Wide<T>* mean) {
  using W = Wide<T>;
  const int64_t tiles = tiles_of(x.tokens), channels = x.channels;
  std::vector<W> sums(static_cast<size_t>(tiles * channels));
  parallel_tasks(tiles, [&](int64_t begin, int64_t end) {
    std::vector<W> room(static_cast<size_t>(kTileTokens * channels));
    for (int64_t tile = begin; tile < end; ++tile)
      sum_directions(read_tile(x, tile, room.data()), channels, &sums[static_cast<size_t>(tile * channels)]);
  });
  std::fill_n(mean, channels, W(0));
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t c = 0; c < channels; ++c) mean[c] += sums[static_cast<size_t>(tile * channels + c)];
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<W>(x.tokens);
}

// m [references, tokens] of one image
template <class T>
void similarities(const Tokens<const T>& x, const std::vector<Wide<T>>& means, int64_t references, Wide<T>* m) {
  using W = Wide<T>;
  parallel_tasks(tiles_of(x.tokens), [&](int64_t begin, int64_t end) {
    std::vector<W> room(static_cast<size_t>(kTileTokens * x.channels));
    for (int64_t tile = begin; tile < end; ++tile) {
      const TileRows<W> rows = read_tile(x, tile, room.data());
      for (int64_t i = 0; i < rows.count; ++i) {
        const W inverse = 1 / norm(rows[i], x.channels);
        for (int64_t r = 0; r < references; ++r)
          m[r * x.tokens + tile * kTileTokens + i] = dot(rows[i], means.data() + r * x.channels, x.channels) * inverse;
      }
    }
  });
}

Tensor cosine_gate(const Tensor& h, const Tensor& h_ref, const std::optional<std::vector<int64_t>>& ref_lengths) {
  const int64_t batch = h.size(0), tokens = h.size(1), channels = h.size(2), ref_tokens = h_ref.size(1);
  STD_TORCH_CHECK(h.scalar_type() == h_ref.scalar_type() && h_ref.size(0) == batch && h_ref.size(2) == channels,
                  "cosine_gate: h and h_ref must have one dtype, batch and channel count");
  std::vector<int64_t> lengths(ref_tokens > 0, ref_tokens);
  if (ref_lengths) lengths = *ref_lengths;
  STD_TORCH_CHECK(std::accumulate(lengths.begin(), lengths.end(), int64_t{0}) == ref_tokens,
                  "cosine_gate: ref_lengths must add up to the tokens of h_ref");
  const auto references = static_cast<int64_t>(lengths.size());
  const bool wide = h.scalar_type() == Scalar::Double;
  Tensor gate = empty_on(h, {batch, references, tokens}, wide ? Scalar::Double : Scalar::Float);
  with_float(h.scalar_type(), [&](auto type) {
    using T = Pointee<decltype(type)>;
    const auto data = static_cast<const T*>(h.const_data_ptr());
    const auto ref_data = static_cast<const T*>(h_ref.const_data_ptr());
    auto m = static_cast<Wide<T>*>(gate.mutable_data_ptr());
    std::vector<Wide<T>> means(static_cast<size_t>(references * channels));
    for (int64_t b = 0; b < batch; ++b, m += references * tokens) {
      Tokens<const T> reference = matrix(h_ref, ref_data, b);
      for (int64_t r = 0; r < references; ++r) {
        reference.tokens = lengths[static_cast<size_t>(r)];
        mean_direction(reference, means.data() + r * channels);
        reference.data += reference.tokens * reference.token_stride;
      }
      similarities(matrix(h, data, b), means, references, m);
      for (int64_t r = 0; r < references; ++r) stretch(m + r * tokens, tokens);
    }
  });
  return gate;
}

// ---------------------------------------------------------------- adain

Tensor adain(const Tensor& x, const Tensor& style) {
  const int64_t d = x.dim();
  STD_TORCH_CHECK(x.scalar_type() == style.scalar_type() && style.dim() == d && style.size(d - 1) == x.size(d - 1) &&
                      matrices_of(style) == matrices_of(x),
                  "adain: x and style must agree in all but the tokens");
  Tensor out = torch::stable::empty_like(x);
  with_float(x.scalar_type(), [&](auto type) {
    using T = Pointee<decltype(type)>;
    const auto from = static_cast<const T*>(x.const_data_ptr());
    const auto like = static_cast<const T*>(style.const_data_ptr());
    const auto to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t tokens = x.size(d - 2), all = matrices_of(x), step = matrices_at_once(tokens * x.size(d - 1));
    for (int64_t first = 0; first < all; first += step)
      align<Wide<T>>(
          std::min(step, all - first), tokens, style.size(d - 2), x.size(d - 1),
          [&](int64_t i, int64_t tile, Wide<T>* room) { return read_tile(matrix(x, from, first + i), tile, room); },
          [&](int64_t i, int64_t tile, Wide<T>* room) { return read_tile(matrix(style, like, first + i), tile, room); },
          [&](int64_t i) { return matrix(out, to, first + i); }, parallel_tasks);
  });
  return out;
}

// ---------------------------------------------------------------- gated_blend

// A gate that broadcasts, as [..., tokens, channels] of the features' shape: stride 0 where it repeats.
struct Gate {
  std::vector<int64_t> strides;

  Gate(const Tensor& gate, const Tensor& features) : strides(static_cast<size_t>(features.dim())) {
    for (int64_t d = 1; d <= gate.dim(); ++d)
      if (gate.size(gate.dim() - d) != 1) *(strides.end() - d) = gate.stride(gate.dim() - d);
  }
};

// In pieces that stay in the first cache.
template <class T, class G>
void blend_row(const T* own, int64_t own_step, const T* ref, int64_t ref_step, const G* gate, int64_t gate_step, T* out,
               int64_t out_step, int64_t n) {
  constexpr int64_t kPiece = 512;
  Wide<T> from[kPiece], to[kPiece];
  Wide<G> weight[kPiece];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t length = std::min(kPiece, n - begin);
    widen(own + begin * own_step, own_step, length, from);
    widen(ref + begin * ref_step, ref_step, length, to);
    widen(gate + begin * gate_step, gate_step, length, weight);
    for (int64_t i = 0; i < length; ++i) from[i] += static_cast<Wide<T>>(weight[i]) * (to[i] - from[i]);
    narrow(from, length, out + begin * out_step, out_step);
  }
}

// Row after row over the innermost dimension of the output, whichever that is in memory.
template <class T, class G>
void blend_all(const Tensor& own, const Tensor& ref, const Tensor& gate, Tensor& out) {
  const auto dims = static_cast<size_t>(out.dim());
  const Gate spread(gate, out);
  std::vector<size_t> order(dims);  // outermost first
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return out.stride(static_cast<int64_t>(a)) > out.stride(static_cast<int64_t>(b));
  });
  const auto last = dims == 0 ? 0 : static_cast<int64_t>(order.back());
  const int64_t n = dims == 0 ? 1 : out.size(last), rows = n == 0 ? 0 : out.numel() / n;
  const auto step = [&](const Tensor& x) { return dims == 0 ? 1 : x.stride(last); };
  const int64_t gate_step = dims == 0 ? 0 : spread.strides[order.back()];
  const auto a = static_cast<const T*>(own.const_data_ptr());
  const auto b = static_cast<const T*>(ref.const_data_ptr());
  const auto g = static_cast<const G*>(gate.const_data_ptr());
  const auto to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1 + 16384 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t at_own = 0, at_ref = 0, at_gate = 0, at_out = 0, index = row;
      for (size_t i = dims; i-- > 0;) {
        const auto d = static_cast<int64_t>(order[i]);
        if (d == last) continue;
        const int64_t place = index % out.size(d);
        index /= out.size(d);
        at_own += place * own.stride(d);
        at_ref += place * ref.stride(d);
        at_gate += place * spread.strides[order[i]];
        at_out += place * out.stride(d);
      }
      blend_row(a + at_own, step(own), b + at_ref, step(ref), g + at_gate, gate_step, to + at_out, step(out), n);
    }
  });
}

Tensor gated_blend(const Tensor& own, const Tensor& ref, const Tensor& gate) {
  STD_TORCH_CHECK(own.scalar_type() == ref.scalar_type() && own.dim() == ref.dim() && gate.dim() <= own.dim(),
                  "gated_blend: own and ref must have one dtype and shape");
  Tensor out = torch::stable::empty_like(own);
  with_float(own.scalar_type(), [&](auto type) {
    using T = Pointee<decltype(type)>;
    if (gate.scalar_type() == own.scalar_type()) return blend_all<T, T>(own, ref, gate, out);
    STD_TORCH_CHECK(gate.scalar_type() == Scalar::Float, "gated_blend: the gate must be float32 or like the features");
    blend_all<T, float>(own, ref, gate, out);
  });
  return out;
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("cosine_gate", TORCH_BOX(&ragsr::cosine_gate));
  m.impl("adain", TORCH_BOX(&ragsr::adain));
  m.impl("gated_blend", TORCH_BOX(&ragsr::gated_blend));
}
