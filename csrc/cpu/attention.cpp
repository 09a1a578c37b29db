// blend_attention for CPU tensors: what separate_attention does after the matrix products. Every tile is blended twice,
// once to measure it and once to write it, so that nothing is stored but the result.
#include <vector>

#include "align.h"
#include "attention.h"
#include "matrices.h"

namespace ragsr {
namespace {

template <class T, class G>
void blend_attention_of(const Tensor& own, const std::vector<Tensor>& others, const Tensor& gate, bool align_to_own,
                        Tensor& out) {
  using W = Wide<T>;
  const int64_t batch = own.size(0), heads = own.size(1), tokens = own.size(2), channels = own.size(3);
  const auto from = static_cast<const T*>(own.const_data_ptr());
  const auto to = static_cast<T*>(out.mutable_data_ptr());
  std::vector<const T*> refs;
  for (const Tensor& other : others) refs.push_back(static_cast<const T*>(other.const_data_ptr()));
  const auto gates = [&](int64_t b) {
    return Gates<G>{static_cast<const G*>(gate.const_data_ptr()) + b * gate.stride(0), gate.size(1), tokens,
                    gate.stride(1), gate.stride(2)};
  };
  std::vector<int64_t> used, unused;  // matrices, batch x heads
  for (int64_t i = 0; i < batch * heads; ++i) (any_open(gates(i / heads)) ? used : unused).push_back(i);

  const auto read_own = [&](int64_t i, int64_t tile, W* room) { return read_tile(matrix(own, from, i), tile, room); };
  const auto write = [&](int64_t i, int64_t token, const W* row) { write_row(matrix(out, to, i), token, row); };
  const auto blended = [&](int64_t i, int64_t tile, W* room) {
    thread_local std::vector<W> rooms;
    rooms.resize(static_cast<size_t>(kTileTokens * channels));
    const Gates<G> open = gates(i / heads);
    start_blend(read_own(i, tile, rooms.data()), open, tile, channels, room);
    for (size_t r = 0; r < refs.size(); ++r) {
      const TileRows<W> other = read_tile(matrix(others[r], refs[r], i), tile, rooms.data());
      add_reference(other, open, static_cast<int64_t>(r), tile, channels, room);
    }
    return TileRows<W>{room, std::min(kTileTokens, tokens - tile * kTileTokens), channels};
  };
  const auto copy = [&](const std::vector<int64_t>& matrices, const auto& read) {
    const int64_t tiles = tiles_of(tokens);
    parallel_tasks(static_cast<int64_t>(matrices.size()) * tiles, [&](int64_t begin, int64_t end) {
      std::vector<W> room(static_cast<size_t>(kTileTokens * channels));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = matrices[static_cast<size_t>(task / tiles)];
        const TileRows<W> rows = read(i, task % tiles, room.data());
        for (int64_t j = 0; j < rows.count; ++j) write(i, task % tiles * kTileTokens + j, rows[j]);
      }
    });
  };

  copy(unused, read_own);
  if (!align_to_own) return copy(used, blended);
  const auto of_used = [&](const auto& function) {
    return [&](int64_t i, int64_t at, auto* rows) { return function(used[static_cast<size_t>(i)], at, rows); };
  };
  align<W>(static_cast<int64_t>(used.size()), tokens, tokens, channels, of_used(blended), of_used(read_own),
           of_used(write), parallel_tasks);
}

// pattern, own [B, H, N, D], others R of [B, H, N, D], gate [B, R, N] -> [B, H, N, D] in the layout of pattern
Tensor blend_attention(const Tensor& pattern, const Tensor& own, const std::vector<Tensor>& others, const Tensor& gate,
                       bool align_to_own) {
  STD_TORCH_CHECK(own.dim() == 4 && gate.dim() == 3 && gate.size(0) == own.size(0) && gate.size(2) == own.size(2) &&
                      gate.size(1) == static_cast<int64_t>(others.size()),
                  "blend_attention: own must be [B, H, N, D] and gate [B, R, N] with one reference per gate");
  for (const Tensor& other : others)
    STD_TORCH_CHECK(other.scalar_type() == own.scalar_type() && other.numel() == own.numel(),
                    "blend_attention: the references must have the dtype and shape of own");
  Tensor out = torch::stable::empty_like(pattern);
  with_float(own.scalar_type(), [&](auto type) {
    using T = Pointee<decltype(type)>;
    if (gate.scalar_type() == own.scalar_type()) return blend_attention_of<T, T>(own, others, gate, align_to_own, out);
    STD_TORCH_CHECK(gate.scalar_type() == Scalar::Float, "blend_attention: the gate must be float32 or like own");
    blend_attention_of<T, float>(own, others, gate, align_to_own, out);
  });
  return out;
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) { m.impl("blend_attention", TORCH_BOX(&ragsr::blend_attention)); }
