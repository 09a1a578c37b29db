// Tensors as operands of group_norm_sft: contiguous and channels-last ones, slices of them along batch or channels (the
// halves of one convolution's output) and broadcast ones are read where they lie; anything else is copied first.
#pragma once

#include <optional>
#include <vector>

#include "../stable.h"
#include "sft.h"

namespace ragsr::sft {

using Sizes = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

inline Sizes sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline int64_t count_positions(const Sizes& sizes) {
  int64_t positions = 1;
  for (size_t d = 2; d < sizes.size(); ++d) positions *= sizes[d];
  return positions;
}

// The rule of `empty_arranged` in ragsr/ops/sft_plain.py.
inline bool is_channels_last(const Tensor& x) {
  return x.dim() > 2 && x.stride(1) == 1 && x.stride(x.dim() - 1) != 1;
}

// Fresh [N, C, *], contiguous or with the channels of a position side by side.
inline Tensor arranged(const Tensor& like, const Sizes& sizes, bool channels_last) {
  if (!channels_last) return empty_on(like, sizes, like.scalar_type());
  Sizes strides(sizes.size(), 1);
  int64_t next = std::max<int64_t>(1, sizes[1]);
  for (size_t d = sizes.size(); d-- > 2; next *= std::max<int64_t>(1, sizes[d])) strides[d] = next;
  strides[0] = next;
  return empty_strided_on(like, sizes, strides, like.scalar_type());
}

// `x` itself if it is arranged like that, else a copy that is.
inline Tensor rearranged(const Tensor& x, bool channels_last) {
  if (is_channels_last(x) == channels_last) return x;
  Tensor out = arranged(x, sizes_of(x), channels_last);
  torch::stable::copy_(out, x);
  return out;
}

// A tensor as a map of `sizes`, against which it broadcasts, with rows along channels or positions. Rows along positions
// may be one element repeated where `constant_rows` allows it.
class [[gnu::visibility("hidden")]] Operand {
 public:
  Operand(const Tensor& x, const Sizes& sizes, bool channels_last, bool constant_rows) : tensor_(x) {
    if (lies_in_rows(sizes, channels_last, constant_rows)) return;
    tensor_ = arranged(x, sizes, channels_last && sizes.size() > 2);
    torch::stable::copy_(tensor_, x);
    lies_in_rows(sizes, channels_last, false);
  }

  const Map& map() const { return map_; }

 private:
  int64_t stride(int64_t d) const { return tensor_.size(d) == 1 ? 0 : tensor_.stride(d); }

  bool lies_in_rows(const Sizes& sizes, bool channels_last, bool constant_rows) {
    const std::optional<int64_t> position = position_stride(sizes);
    if (!position) return false;
    map_ = {const_cast<void*>(tensor_.const_data_ptr()), stride(0), stride(1), *position};
    if (channels_last) return map_.channel == 1 || sizes[1] == 1;
    return map_.position == 1 || (map_.position == 0 && constant_rows);
  }

  // From position to position, if the dimensions of the positions are evenly spaced.
  std::optional<int64_t> position_stride(const Sizes& sizes) const {
    std::optional<int64_t> innermost;
    int64_t next = 0;
    for (int64_t d = tensor_.dim() - 1; d >= 2; --d) {
      const int64_t size = sizes[static_cast<size_t>(d)];
      if (size == 1) continue;
      if (innermost && stride(d) != next) return std::nullopt;
      if (!innermost) innermost = stride(d);
      next = stride(d) * size;
    }
    return innermost.value_or(0);
  }

  Tensor tensor_;
  Map map_;
};

// One call of an op: its sizes and layout, and the operands, which are kept alive.
class [[gnu::visibility("hidden")]] Call {
 public:
  Call(const Tensor& x, int64_t groups, const Maybe& x2, const Tensor& weight, const Tensor& bias)
      : sizes(sizes_of(x)), channels_last(is_channels_last(x) && (!x2 || is_channels_last(*x2))), x_(x),
        weight_(dense(weight)), bias_(dense(bias)) {
    sizes[1] += x2 ? x2->size(1) : 0;
    STD_TORCH_CHECK(groups > 0 && sizes[1] % groups == 0, "groups must divide the channels");
    STD_TORCH_CHECK(weight_.numel() == sizes[1] && bias_.numel() == sizes[1], "one weight and bias per channel");
    const int64_t positions = count_positions(sizes);
    shape = {sizes[0], sizes[1], positions, groups, x.size(1), channels_last || positions == 1};
    operands.weight = weight_.const_data_ptr();
    operands.bias = bias_.const_data_ptr();
    operands.x = map(x, with_channels(x.size(1)));
    if (x2) operands.x2 = map(*x2, with_channels(x2->size(1)));
  }

  Sizes with_channels(int64_t channels) const {
    Sizes changed = sizes;
    changed[1] = channels;
    return changed;
  }

  Map map(const Tensor& x, const Sizes& of, bool constant_rows = false) {
    kept_.emplace_back(x, of, shape.channels_last, constant_rows);
    return kept_.back().map();
  }
  Map map(const Tensor& x) { return map(x, sizes); }
  Map map_or_constants(const Tensor& x) { return map(x, sizes, true); }

  Tensor fresh(const Sizes& of) const { return arranged(x_, of, channels_last); }
  Tensor fresh_statistics() const {
    const bool exact = x_.scalar_type() == Scalar::Double;
    return empty_on(x_, {shape.batch, shape.groups}, exact ? Scalar::Double : Scalar::Float);
  }

  Sizes sizes;         // [N, C, *]
  bool channels_last;  // the result; rows of single positions run along channels, too
  Shape shape;
  Operands operands{};

 private:
  Tensor x_, weight_, bias_;
  std::vector<Operand> kept_;
};

}  // namespace ragsr::sft
