// Sums in a fixed order, the same on every run and for any number of threads; free of torch.
#pragma once

#include <cmath>
#include <cstdint>

namespace ragsr {

// Added in `kLanes` separate sums, which the compiler keeps in vectors; then pair by pair.
template <class T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t kLanes = 32;
  T sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int64_t lane = 0; i < n; ++i, ++lane) sums[lane] += a[i] * b[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

// ‖x‖ + 1e-8
template <class T>
T norm(const T* x, int64_t n) {
  return std::sqrt(dot(x, x, n)) + T(1e-8);
}

}  // namespace ragsr
