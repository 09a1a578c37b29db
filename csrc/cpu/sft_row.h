// What the kernels of group_norm_sft are told about a block of rows (sft_rows.h), and the table of them for one dtype.
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

// One operand in a block of rows: the elements of a row follow one another (step 1), or one stands for all (step 0; along
// positions only); the next row starts `next` elements on. Null where there is none.
struct Stream {
  void* at;
  int64_t step, next;
};

// Values of the channels (mean … shift, shared, spread) and their sums are Real: one for each row where rows run along
// positions, one for each element of a row where they run along channels.
template <class Real>
struct ForwardBlock {
  int64_t rows, count;
  Stream x, gamma, beta, residual, out;
  const Real *mean, *scale, *shift;  // μ, w / σ, b
  Activation activation;
  Real share;  // s of s · y + (1 − s) · x
  bool mixed;  // whether s was given
};

// What the first pass of the backward sums over the positions of each channel.
enum Sum { kAffine, kAffineZ, kT, kTAffine, kSums };  // grad_a, grad_a · (x − μ), grad_t, grad_t · a

template <class Real>
struct BackwardBlock {
  int64_t rows, count;
  Stream x, grad, gamma, beta;
  const Real *mean, *scale, *shift;  // μ, w / σ, b
  Activation activation;
  Real share;
  bool mixed;
  // first pass
  Stream dgamma, dbeta;
  Real* sums[kSums];
  int64_t next_sum;  // from a row's sums to the next row's, along positions
  // second pass
  const Real *weight, *rstd, *shared, *spread;  // w, 1 / σ; of the group, means of grad_a · w and of grad_a · w · ẑ / σ
  Stream dx;
};

template <class Real>
struct Kernels {
  size_t element;  // bytes of one
  // Σ (x − centre) and Σ (x − centre)²: of all elements of the block, and added to those of each channel
  void (*measure)(const Stream& x, int64_t rows, int64_t count, Real centre, double* sum, double* square);
  void (*measure_channels)(const Stream& x, int64_t rows, int64_t count, const Real* centres, Real* sums, Real* squares);
  void (*modulate)(const ForwardBlock<Real>& block);
  void (*map_gradients)(const BackwardBlock<Real>& block);
  void (*input_gradient)(const BackwardBlock<Real>& block);
  void (*widen)(const void* from, int64_t count, Real* to);
  void (*narrow)(const Real* from, int64_t count, void* to);
};

}  // namespace ragsr::sft
