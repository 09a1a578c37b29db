// Tensors as the views that the kernels of group_norm_sft read: where they lie, if the positions have one stride.
#pragma once

#include <optional>
#include <vector>

#include "../stable.h"
#include "sft.h"

namespace ragsr::gpu {

using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline int64_t positions_of(const Sizes& sizes) {
  int64_t positions = 1;
  for (size_t d = 2; d < sizes.size(); ++d) positions *= sizes[d];
  return positions;
}

// The rule of `empty_arranged` in ragsr/ops/sft_plain.py.
inline bool is_channels_last(const Tensor& x) {
  return x.dim() > 2 && x.stride(1) == 1 && x.stride(x.dim() - 1) != 1;
}

inline Tensor arranged(const Tensor& like, const Sizes& sizes, bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(like, sizes);
  const Tensor room = torch::stable::new_empty(like, Sizes{sizes[0], positions_of(sizes), sizes[1]});
  return torch::stable::view(torch::stable::transpose(room, 1, 2), sizes);
}

// The stride from position to position of x as a map of `sizes`, if there is one.
inline std::optional<int64_t> position_stride(const Tensor& x, const Sizes& sizes) {
  std::optional<int64_t> innermost;
  int64_t next = 0;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    const int64_t size = sizes[static_cast<size_t>(d)], stride = x.size(d) == 1 ? 0 : x.stride(d);
    if (size == 1) continue;
    if (innermost && stride != next) return std::nullopt;
    if (!innermost) innermost = stride;
    next = stride * size;
  }
  return innermost.value_or(0);
}

inline bool broadcasts(const Tensor& x, const Sizes& sizes) {
  if (x.dim() != static_cast<int64_t>(sizes.size()) || x.size(1) != sizes[1]) return false;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1 && x.size(d) != sizes[static_cast<size_t>(d)]) return false;
  }
  return true;
}

// `x` as a map of `sizes`, against which it broadcasts; copied into `kept` where the positions have no common stride.
template <class T>
View<T> view_of(const Tensor& x, const Sizes& sizes, Along along, std::vector<Tensor>& kept) {
  STD_TORCH_CHECK(broadcasts(x, sizes), "an operand of group_norm_sft has the wrong shape");
  kept.push_back(x);
  if (!position_stride(x, sizes)) {
    kept.back() = arranged(x, sizes, along == Along::channels);
    torch::stable::copy_(kept.back(), x);
  }
  const Tensor& y = kept.back();
  const auto stride = [&](int64_t d) { return y.size(d) == 1 ? 0 : y.stride(d); };
  View<T> view{static_cast<T*>(const_cast<void*>(y.const_data_ptr())), stride(0), stride(1),
               *position_stride(y, sizes), false};
  constexpr int64_t V = 16 / sizeof(T);
  const int64_t step = along == Along::positions ? view.position : view.channel;
  const int64_t across = along == Along::positions ? view.channel : view.position;
  view.dense = step == 1 && across % V == 0 && view.batch % V == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  return view;
}

}  // namespace ragsr::gpu
