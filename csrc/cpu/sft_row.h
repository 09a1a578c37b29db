// What the kernels of group_norm_sft are told about one row (sft_rows.h), and the table of them for one dtype.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ragsr::sft {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

enum class Activation { none, silu, relu };

// A row along positions is no longer than this: 16 KiB of float32, half a first cache.
constexpr int64_t kLongestRow = 4096;
constexpr int64_t kMostLanes = 16;

// One operand along a row: elements one after another (step 1), or one for all (step 0; along positions only).
struct Stream {
  const void* at;
  int64_t step;
};

// Of the channels, one Real for a row along positions, `count` for a row along channels: mean … shift, rstd … bias and
// mean_grad, mean_grad_z.
template <class Real>
struct ForwardRow {
  int64_t count;
  const void* x;
  Stream gamma, beta;
  const void* residual;              // or null
  const Real *mean, *scale, *shift;  // μ, w / σ, b
  void* out;
  Activation activation;
  Real share;  // s of s · y + (1 − s) · x
  bool mixed;  // whether s was given
};

template <class Real>
struct BackwardRow {
  int64_t count;
  const void* x;
  Stream grad, gamma, beta;
  const Real *mean, *rstd, *weight, *bias;
  Activation activation;
  Real share;
  // first pass
  void *dgamma, *dbeta;  // null: not a map, summed instead
  Real* sums[4];         // of grad_a, grad_a · ẑ, grad_t, grad_t · a: [kMostLanes] of the row, or one of each channel
  // second pass
  const Real *mean_grad, *mean_grad_z;  // over the group, of grad_a · w and of grad_a · w · ẑ
  void* dx;
};

template <class Real>
struct Kernels {
  size_t element;  // bytes of one
  void (*add_positions)(const void* row, int64_t count, Real centre, Real* sums, Real* squares);
  void (*add_channels)(const void* row, int64_t count, const Real* centres, Real* sums, Real* squares);
  void (*modulate)(const ForwardRow<Real>& row);
  void (*map_gradients)(const BackwardRow<Real>& row);
  void (*input_gradient)(const BackwardRow<Real>& row);
  void (*widen)(const void* from, int64_t count, Real* to);
  void (*narrow)(const Real* from, int64_t count, void* to);
};

}  // namespace ragsr::sft
