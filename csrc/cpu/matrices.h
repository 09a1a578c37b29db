// Tensors [..., tokens, channels] as matrices of any strides: the few lines between stable.h and tokens.h.
#pragma once

#include <algorithm>
#include <functional>

#include "../stable.h"
#include "tokens.h"

namespace ragsr {

template <>
inline constexpr bool is_float16<torch::headeronly::Half> = true;

template <class Pointer>
using Pointee = std::remove_const_t<std::remove_pointer_t<Pointer>>;

inline int64_t matrices_of(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d < x.dim() - 2; ++d) count *= x.size(d);
  return count;
}

// Where matrix `index` of x begins, in elements.
inline int64_t matrix_offset(const Tensor& x, int64_t index) {
  int64_t offset = 0;
  for (int64_t d = x.dim() - 3; d >= 0; --d) {
    offset += index % x.size(d) * x.stride(d);
    index /= x.size(d);
  }
  return offset;
}

template <class T>
Tokens<T> matrix(const Tensor& x, T* data, int64_t index) {
  const int64_t d = x.dim();
  return {data + matrix_offset(x, index), x.size(d - 2), x.size(d - 1), x.stride(d - 2), x.stride(d - 1)};
}

inline void parallel_tasks(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
}

// So many that every thread has enough to do, and not more: a later pass should find them in the cache still.
inline int64_t matrices_at_once(int64_t elements) {
  constexpr int64_t kPerThread = 1 << 16;  // of a matrix: 256 KB of float
  return std::max<int64_t>(1, kPerThread * torch::stable::get_num_threads() / std::max<int64_t>(1, elements));
}

}  // namespace ragsr
