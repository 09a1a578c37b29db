// What separate_attention does after the matrix products, for CPU tensors. `blend_reference` takes the attention to one
// reference into a blend of float (double for double), so that the memory does not grow with the references;
// `finish_attention` does so with the last one and gives the blend the statistics of the own attention. It takes few
// matrices at a time: what is measured and then written is read from memory once.
#include <algorithm>
#include <numeric>
#include <vector>

#include "align.h"
#include "attention.h"
#include "matrices.h"

namespace ragsr {
namespace {

// The gates of image `b` of gate [B, R, N].
template <class G>
Gates<G> gates_of(const Tensor& gate, int64_t b) {
  const auto data = static_cast<const G*>(gate.const_data_ptr());
  return {data + b * gate.stride(0), gate.size(1), gate.size(2), gate.stride(1), gate.stride(2)};
}

// Calls f with the types of own and of the gate, which is float or like own.
template <class F>
void with_gate(const Tensor& own, const Tensor& gate, const F& f) {
  with_float(own.scalar_type(), [&](auto type) {
    if (gate.scalar_type() == own.scalar_type()) return f(type, type);
    STD_TORCH_CHECK(gate.scalar_type() == Scalar::Float, "the gate must be float32 or of the dtype of own");
    f(type, static_cast<const float*>(nullptr));
  });
}

void check_blend(const Tensor& fused, const Tensor& own, const Tensor& gate) {
  const bool shapes = own.dim() == 4 && fused.dim() == 4 && gate.dim() == 3 && gate.size(0) == own.size(0) &&
                      gate.size(2) == own.size(2);
  STD_TORCH_CHECK(shapes, "own and fused must be [B, H, N, D] and gate [B, R, N]");
  for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(fused.size(d) == own.size(d), "fused must have the shape of own");
  const bool wide = own.scalar_type() == Scalar::Double;
  STD_TORCH_CHECK(fused.scalar_type() == (wide ? Scalar::Double : Scalar::Float),
                  "fused must be float64 beside float64 and else float32");
}

void check_reference(const Tensor& other, const Tensor& own, const Tensor& gate, int64_t reference) {
  STD_TORCH_CHECK(other.scalar_type() == own.scalar_type() && other.dim() == 4 && other.numel() == own.numel() &&
                      0 <= reference && reference < gate.size(1),
                  "other must be like own, and there must be a gate for the reference");
}

// Reference `reference` into the tiles of these matrices (batch x heads); reference 0 begins the blend.
template <class T, class G>
void blend_matrices(const int64_t* matrices, int64_t count, Tensor& fused, const Tensor& own, const Tensor& other,
                    const Tensor& gate, int64_t reference) {
  using W = Wide<T>;
  const auto own_data = static_cast<const T*>(own.const_data_ptr());
  const auto other_data = static_cast<const T*>(other.const_data_ptr());
  const auto fused_data = static_cast<W*>(fused.mutable_data_ptr());
  const int64_t heads = own.size(1), tiles = tiles_of(own.size(2)), channels = own.size(3);
  parallel_tasks(count * tiles, [&](int64_t begin, int64_t end) {
    std::vector<W> room(static_cast<size_t>(2 * kTileTokens * channels));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = matrices[task / tiles], tile = task % tiles;
      const Gates<G> gates = gates_of<G>(gate, i / heads);
      const Tokens<W> to = matrix(fused, fused_data, i);
      const TileRows<W> theirs = read_tile(matrix(other, other_data, i), tile, room.data());
      if (reference > 0) {
        add_reference(theirs, gates, reference, tile, to);
      } else {
        W* rest = room.data() + kTileTokens * channels;
        start_blend(read_tile(matrix(own, own_data, i), tile, rest), theirs, gates, tile, to);
      }
    }
  });
}

// fused, own, other [B, H, N, D], gate [B, R, N]
void blend_reference(Tensor fused, const Tensor& own, const Tensor& other, const Tensor& gate, int64_t reference) {
  check_blend(fused, own, gate);
  check_reference(other, own, gate, reference);
  std::vector<int64_t> all(static_cast<size_t>(matrices_of(own)));
  std::iota(all.begin(), all.end(), int64_t{0});
  with_gate(own, gate, [&](auto type, auto gate_type) {
    blend_matrices<Pointee<decltype(type)>, Pointee<decltype(gate_type)>>(
        all.data(), matrices_of(own), fused, own, other, gate, reference);
  });
}

// The matrices of images whose gate is not 0 throughout, or those of all others.
template <class G>
std::vector<int64_t> matrices_with(bool open, const Tensor& gate, int64_t heads) {
  std::vector<int64_t> found;
  for (int64_t b = 0; b < gate.size(0); ++b)
    if (any_open(gates_of<G>(gate, b)) == open)
      for (int64_t h = 0; h < heads; ++h) found.push_back(b * heads + h);
  return found;
}

// A piece of memory [B, H, N, D] as matrices whose tiles are read.
template <class T>
auto tiles_in(const Tensor& x) {
  return [&x, data = static_cast<const T*>(x.const_data_ptr())](int64_t i, int64_t tile, Wide<T>* room) {
    return read_tile(matrix(x, data, i), tile, room);
  };
}

template <class T, class G>
void finish_attention_of(Tensor& out, Tensor& fused, const Tensor& own, const Tensor& other, const Tensor& gate,
                         bool align_to_own) {
  using W = Wide<T>;
  const int64_t tokens = own.size(2), tiles = tiles_of(tokens), channels = own.size(3);
  const auto out_data = static_cast<T*>(out.mutable_data_ptr());
  const auto read_own = tiles_in<T>(own);
  const auto read_fused = tiles_in<W>(fused);
  const auto copy = [&](const int64_t* matrices, int64_t count, const auto& read) {
    parallel_tasks(count * tiles, [&](int64_t begin, int64_t end) {
      std::vector<W> room(static_cast<size_t>(kTileTokens * channels));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = matrices[task / tiles], tile = task % tiles;
        const TileRows<W> rows = read(i, tile, room.data());
        const Tokens<T> to = matrix(out, out_data, i);
        for (int64_t j = 0; j < rows.count; ++j) write_row(to, tile * kTileTokens + j, rows[j]);
      }
    });
  };

  const std::vector<int64_t> unused = matrices_with<G>(false, gate, own.size(1));
  const std::vector<int64_t> used = matrices_with<G>(true, gate, own.size(1));
  const auto all = static_cast<int64_t>(used.size()), step = matrices_at_once(tokens * channels);
  copy(unused.data(), static_cast<int64_t>(unused.size()), read_own);
  for (int64_t first = 0; first < all; first += step) {
    const int64_t count = std::min(step, all - first);
    const int64_t* few = used.data() + first;
    const auto of_few = [few](const auto& function) {
      return [few, &function](int64_t i, int64_t at, auto* rows) { return function(few[i], at, rows); };
    };
    blend_matrices<T, G>(few, count, fused, own, other, gate, gate.size(1) - 1);
    if (align_to_own) {
      align<W>(count, tokens, tokens, channels, of_few(read_fused), of_few(read_own),
               [&](int64_t i) { return matrix(out, out_data, few[i]); }, parallel_tasks);
    } else if (out.const_data_ptr() != fused.const_data_ptr()) {
      copy(few, count, read_fused);
    }
  }
}

// out [B, H, N, D] of the dtype of own, may be fused itself; other is the attention to the last reference
void finish_attention(Tensor out, Tensor fused, const Tensor& own, const Tensor& other, const Tensor& gate,
                      bool align_to_own) {
  check_blend(fused, own, gate);
  check_reference(other, own, gate, gate.size(1) - 1);
  STD_TORCH_CHECK(out.scalar_type() == own.scalar_type() && out.dim() == 4 && out.numel() == own.numel(),
                  "finish_attention: out must have the dtype and shape of own");
  with_gate(own, gate, [&](auto type, auto gate_type) {
    finish_attention_of<Pointee<decltype(type)>, Pointee<decltype(gate_type)>>(out, fused, own, other, gate,
                                                                                align_to_own);
  });
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("blend_reference", TORCH_BOX(&ragsr::blend_reference));
  m.impl("finish_attention", TORCH_BOX(&ragsr::finish_attention));
}
