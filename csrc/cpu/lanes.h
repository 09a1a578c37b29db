// Vectors of 16 bytes, which every 64-bit processor has: for loops that a compiler does not see through. Free of torch.
#pragma once

#include <cstdint>
#include <cstring>

namespace ragsr {

template <class W>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = float __attribute__((vector_size(16)));
};
template <>
struct VectorOf<double> {
  using type = double __attribute__((vector_size(16)));
};

template <class W>
struct Lanes {
  using Vector = typename VectorOf<W>::type;
  static constexpr int64_t count = 16 / sizeof(W);

  static Vector load(const W* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static void store(W* to, Vector x) { std::memcpy(to, &x, sizeof x); }
};

}  // namespace ragsr
