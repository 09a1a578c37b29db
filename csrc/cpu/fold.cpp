// gather_fold and its backward for CPU tensors. The loops stand in fold.h.
#include "fold.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../stable.h"

namespace ragsr {
namespace {

const auto parallel = [](int64_t tasks, const auto& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
};

// Calls f with a null pointer to T and to the type its sums are taken in.
template <class F>
void with_float_type(Scalar dtype, const F& f) {
  bool floating = false;
  with_type(dtype, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    if constexpr (!std::is_integral_v<T>) {
      floating = true;
      f(type, static_cast<const Wide*>(nullptr));
    }
  });
  STD_TORCH_CHECK(floating, "features must be float16, bfloat16, float32 or float64");
}

Fold fold_of(const Tensor& index, int64_t height, int64_t width, int64_t patch, int64_t stride) {
  STD_TORCH_CHECK(index.dim() == 3 && index.scalar_type() == Scalar::Long, "index must be int64 [batch, h, w]");
  STD_TORCH_CHECK(stride >= 1 && patch >= 1 && patch % (2 * stride) == stride, "patch must be an odd multiple of stride");
  STD_TORCH_CHECK(height % stride == 0 && width % stride == 0, "sides must be multiples of stride");
  STD_TORCH_CHECK(std::max(height, width) <= std::numeric_limits<int32_t>::max(), "sides must be below 2^31");
  return {index.size(1), index.size(2), height / stride, width / stride, stride, patch / stride};
}

// std::out_of_range becomes Python's IndexError.
Matches read_matches(const Tensor& index, int64_t batch, const Fold& fold) {
  const int64_t cells = fold.h * fold.w;
  const int64_t* first = index.const_data_ptr<int64_t>() + batch * cells;
  Matches matches;
  if (matches.read(first, fold)) return matches;
  const auto ends = std::minmax_element(first, first + cells);
  throw std::out_of_range("gather_fold: index runs from " + std::to_string(*ends.first) + " to " +
                          std::to_string(*ends.second) + "; it must lie in 0 to " +
                          std::to_string(fold.rows * fold.columns - 1) + ", the cells of the features");
}

Tensor gather_fold_cpu(const Tensor& any_features, const Tensor& any_index, int64_t patch, int64_t stride) {
  const Tensor features = torch::stable::contiguous(any_features), index = torch::stable::contiguous(any_index);
  STD_TORCH_CHECK(features.dim() == 4 && features.size(0) == index.size(0), "features must be [batch, channels, H, W]");
  const Fold fold = fold_of(index, features.size(2), features.size(3), patch, stride);
  const int64_t channels = features.size(1);
  Tensor out = empty_on(features, {features.size(0), channels, fold.h * stride, fold.width()}, features.scalar_type());
  with_float_type(features.scalar_type(), [&](auto type, auto wide) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    using Wide = std::remove_const_t<std::remove_pointer_t<decltype(wide)>>;
    const T* from = features.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for (int64_t batch = 0; batch < features.size(0); ++batch)
      gather_fold<T, Wide>(fold, read_matches(index, batch, fold), from + batch * channels * fold.source_pixels(),
                           channels, to + batch * channels * fold.pixels(), parallel);
  });
  return out;
}

Tensor gather_fold_backward_cpu(const Tensor& any_grad, const Tensor& any_index, int64_t height, int64_t width,
                                int64_t patch, int64_t stride) {
  const Tensor grad = torch::stable::contiguous(any_grad), index = torch::stable::contiguous(any_index);
  const Fold fold = fold_of(index, height, width, patch, stride);
  const int64_t channels = grad.size(1);
  STD_TORCH_CHECK(grad.size(0) == index.size(0) && grad.size(2) == fold.h * stride && grad.size(3) == fold.width(),
                  "grad must be [batch, channels, h * stride, w * stride]");
  Tensor out = empty_on(grad, {grad.size(0), channels, height, width}, grad.scalar_type());
  with_float_type(grad.scalar_type(), [&](auto type, auto wide) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    using Wide = std::remove_const_t<std::remove_pointer_t<decltype(wide)>>;
    const T* from = grad.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for (int64_t batch = 0; batch < grad.size(0); ++batch)
      gather_fold_backward<T, Wide>(fold, read_matches(index, batch, fold), from + batch * channels * fold.pixels(),
                                    channels, to + batch * channels * fold.source_pixels(), parallel);
  });
  return out;
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("gather_fold", TORCH_BOX(&ragsr::gather_fold_cpu));
  m.impl("gather_fold_backward", TORCH_BOX(&ragsr::gather_fold_backward_cpu));
}
