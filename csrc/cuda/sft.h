// What one thread does in the kernels of group_norm_sft_forward.
//
// Features are [batch, channels, positions]. A thread reads vectors of V elements (16 bytes) along positions or, for
// channels-last, along channels; V = 1 where the sizes do not allow it. γ, β and the residual may lie in any way:
// what is not dense in the direction of the vectors is read element by element.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RAGSR_BOTH __host__ __device__ __forceinline__
#define RAGSR_UNROLL _Pragma("unroll")
#else
#define RAGSR_BOTH inline
#define RAGSR_UNROLL
#endif

namespace ragsr::gpu {

constexpr int kInFlight = 4;  // vectors that a thread asks for before it looks at the first

enum class Activation : int { none, silu, relu };
enum class Along : int { positions, channels };

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <class T>
struct View {
  T* data;
  int64_t batch, channel, position;  // strides; 0 repeats
  bool dense;                        // vectors may be read: neighbours side by side, every one of them aligned

  RAGSR_BOTH T* at(int64_t b, int64_t c, int64_t p) const { return data + b * batch + c * channel + p * position; }
};

// Everything a kernel needs. Real is float, or double for double.
template <class T, class Real>
struct Problem {
  View<const T> x, x2, gamma, beta, residual;  // x2 and residual may be absent: null
  View<T> out;
  View<const T> weight, bias;  // [channels]
  Real *mean, *rstd;  // [batch, groups]
  int64_t batch, channels1, channels, positions, groups, members;
  Real eps, share;  // share: of the modulated features in the result
  bool mixed;
  Activation activation;
};

// ---------------------------------------------------------------- vectors

// kOnce: nobody reads it again, so it should not push anything out of the caches.
template <int V, bool kOnce, class T>
RAGSR_BOTH Pack<T, V> read_vector(const T* data) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) * V == 16 && kOnce) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(data));
    return *reinterpret_cast<const Pack<T, V>*>(&raw);
  }
#endif
  return *reinterpret_cast<const Pack<T, V>*>(data);
}

template <int V, class T>
RAGSR_BOTH void write_vector(T* data, const Pack<T, V>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) * V == 16) {
    __stcs(reinterpret_cast<uint4*>(data), *reinterpret_cast<const uint4*>(&pack));
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(data) = pack;
}

template <int V, Along A, bool kOnce, class T>
RAGSR_BOTH Pack<T, V> read(const View<const T>& view, int64_t b, int64_t c, int64_t p) {
  const T* data = view.at(b, c, p);
  if (V == 1 || view.dense) return read_vector<V, kOnce>(data);
  const int64_t step = A == Along::positions ? view.position : view.channel;
  Pack<T, V> pack;
  RAGSR_UNROLL
  for (int i = 0; i < V; ++i) pack.at[i] = data[i * step];
  return pack;
}

// z = [x, x2]; no vector lies across the seam.
template <int V, Along A, bool kOnce, class T, class Real>
RAGSR_BOTH Pack<T, V> read_joined(const Problem<T, Real>& k, int64_t b, int64_t c, int64_t p) {
  return c < k.channels1 ? read<V, A, kOnce>(k.x, b, c, p) : read<V, A, kOnce>(k.x2, b, c - k.channels1, p);
}

// The values of one or, along channels, V channels.
template <int V, Along A, class T>
RAGSR_BOTH Pack<T, V> read_channels(const View<const T>& vector, int64_t c) {
  if constexpr (A == Along::channels) return read<V, A, false>(vector, 0, c, 0);
  Pack<T, V> pack;
  const T value = *vector.at(0, c, 0);
  RAGSR_UNROLL
  for (int i = 0; i < V; ++i) pack.at[i] = value;
  return pack;
}

// n / d and n % d, with the short division where it will do.
RAGSR_BOTH void divide(int64_t n, int64_t d, int64_t& quotient, int64_t& rest) {
  if (((n | d) >> 32) == 0) {
    quotient = static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
  } else {
    quotient = n / d;
  }
  rest = n - quotient * d;
}

RAGSR_BOTH void divide(int n, int d, int& quotient, int& rest) {
  quotient = static_cast<int>(static_cast<unsigned>(n) / static_cast<unsigned>(d));
  rest = n - quotient * d;
}

// The v-th vector of [channels, positions], in the order of memory: its first channel and position.
template <int V, Along A, class Index>
RAGSR_BOTH void place(Index v, Index channels, Index positions, Index& c, Index& p) {
  if constexpr (A == Along::positions) {
    divide(v, positions / V, c, p);
    p *= V;
  } else {
    divide(v, channels / V, p, c);
    c *= V;
  }
}

// ---------------------------------------------------------------- statistics

template <class Real>
struct Moments {
  Real count, mean, m2;  // m2: sum of the squared deviations from the mean
};

// Chan's formula; either may be empty.
template <class Real>
RAGSR_BOTH Moments<Real> merge(const Moments<Real>& a, const Moments<Real>& b) {
  const Real count = a.count + b.count;
  if (count == 0) return a;
  const Real share = b.count / count, delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Welford, V streams at a time: a large mean costs no digits.
template <int V, class Real>
struct Streams {
  Real count = 0, mean[V] = {}, m2[V] = {};

  template <class T>
  RAGSR_BOTH void add(const Pack<T, V>& pack) {
    count += 1;
    const Real weight = 1 / count;
    RAGSR_UNROLL
    for (int i = 0; i < V; ++i) {
      const Real value = static_cast<Real>(pack.at[i]), delta = value - mean[i];
      mean[i] += delta * weight;
      m2[i] += delta * (value - mean[i]);
    }
  }

  RAGSR_BOTH Moments<Real> all() const {
    Moments<Real> sum{count, mean[0], m2[0]};
    RAGSR_UNROLL
    for (int i = 1; i < V; ++i) sum = merge(sum, {count, mean[i], m2[i]});
    return sum;
  }
};

// One thread's vectors of V channels (or of one, along positions) in positions [start, stop): every `step`-th.
template <int V, Along A, class T, class Real>
RAGSR_BOTH Streams<V, Real> gather(const Problem<T, Real>& k, int64_t b, int64_t c, int64_t start, int64_t stop,
                                   int64_t first, int64_t step) {
  constexpr int64_t width = A == Along::positions ? V : 1;
  Streams<V, Real> streams;
  for (int64_t at = start + first * width; at < stop; at += kInFlight * step * width) {
    Pack<T, V> z[kInFlight];
    RAGSR_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t p = at + i * step * width;
      if (p < stop) z[i] = read_joined<V, A, false>(k, b, c, p);
    }
    RAGSR_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (at + i * step * width < stop) streams.add(z[i]);
    }
  }
  return streams;
}

// ---------------------------------------------------------------- how features are cut for statistics

constexpr int kThreads = 256;           // of a block
constexpr int kBlocksPerProcessor = 8;  // not measured yet

// How the positions and, for channels-last, the channels are cut.
struct Parts {
  int64_t splits, span;    // S parts of so many positions
  int64_t blocks, across;  // blocks per sample and part; channels-last: vectors of channels that a block covers
};

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

template <int V, Along A>
Parts parts_of(int64_t batch, int64_t channels, int64_t positions, int processors) {
  Parts parts{};
  parts.blocks = A == Along::positions ? channels : ceil_div(channels / V, kThreads);
  parts.across = A == Along::positions ? 1 : ceil_div(channels / V, parts.blocks);
  const int64_t step = A == Along::positions ? kThreads * V : kThreads / parts.across;  // positions read at once
  const int64_t wanted = ceil_div(int64_t{processors} * kBlocksPerProcessor, batch * parts.blocks);
  const int64_t most = std::max<int64_t>(1, positions / (4 * step));  // so that partial results stay few
  parts.span = ceil_div(ceil_div(positions, std::min(wanted, most)), step) * step;
  parts.splits = ceil_div(positions, parts.span);
  return parts;
}

// ---------------------------------------------------------------- modulation

template <class Real>
RAGSR_BOTH Real activate(Real t, Activation activation) {
  if (activation == Activation::silu) return t / (1 + exp(-t));
  if (activation == Activation::relu) return t < 0 ? Real(0) : t;  // NaN stays
  return t;
}

// What modulates one vector.
template <int V, class T>
struct Maps {
  Pack<T, V> gamma, beta, residual;  // residual: where there is one
};

template <int V, Along A, class T, class Real>
RAGSR_BOTH Maps<V, T> read_maps(const Problem<T, Real>& k, int64_t b, int64_t c, int64_t p) {
  Maps<V, T> maps;
  maps.gamma = read<V, A, true>(k.gamma, b, c, p);
  maps.beta = read<V, A, true>(k.beta, b, c, p);
  if (k.residual.data) maps.residual = read<V, A, true>(k.residual, b, c, p);
  return maps;
}

// Everything after the statistics, on one vector. mean(i) and rstd(i) are those of its i-th element.
template <int V, Along A, class T, class Real, class Mean, class Rstd>
RAGSR_BOTH void modulate(const Problem<T, Real>& k, int64_t b, int64_t c, int64_t p, const Pack<T, V>& z,
                         const Maps<V, T>& maps, const Mean& mean, const Rstd& rstd) {
  const Pack<T, V> weight = read_channels<V, A>(k.weight, c), bias = read_channels<V, A>(k.bias, c);
  Pack<T, V> out;
  RAGSR_UNROLL
  for (int i = 0; i < V; ++i) {
    const Real value = static_cast<Real>(z.at[i]), z_hat = (value - mean(i)) * rstd(i);
    const Real affine = z_hat * static_cast<Real>(weight.at[i]) + static_cast<Real>(bias.at[i]);
    Real y = affine * (1 + static_cast<Real>(maps.gamma.at[i])) + static_cast<Real>(maps.beta.at[i]);
    y = activate(y, k.activation);
    if (k.mixed) y = k.share * y + (1 - k.share) * value;
    if (k.residual.data) y += static_cast<Real>(maps.residual.at[i]);
    out.at[i] = static_cast<T>(y);
  }
  write_vector(k.out.at(b, c, p), out);
}

}  // namespace ragsr::gpu
