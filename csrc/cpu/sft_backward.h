// The backward of group_norm_sft on the CPU, free of torch. With t = a · (1 + γ) + β and a = ẑ · w + b, the sums of
// grad_a and grad_a · ẑ over each channel give the gradients of b and w, and, weighted with w, the two means over the
// group that the gradient of ẑ needs.
#pragma once

#include "sft.h"

namespace ragsr::sft {

template <class Real>
class Backward : Rows<Real> {
 public:
  Backward(const Kernels<Real>& kernels, const Shape& shape, const Operands& operands, const Options& options,
           const void* mean, const void* rstd)  // Real [N, groups]
      : Rows<Real>(kernels, shape, operands, options), tiling_(shape), weight_(this->widened(operands.weight)),
        bias_(this->widened(operands.bias)) {
    const auto channels = static_cast<size_t>(shape.batch * shape.channels);
    for (std::vector<Real>* values : {&means_, &rstds_, &scales_, &shared_, &spread_}) values->resize(channels);
    for (size_t i = 0; i < channels; ++i) {
      const size_t group = i / static_cast<size_t>(shape.group_channels());
      means_[i] = static_cast<const Real*>(mean)[group];
      rstds_[i] = static_cast<const Real*>(rstd)[group];
      scales_[i] = weight_[i % static_cast<size_t>(shape.channels)] * rstds_[i];
    }
    for (int which = 0; which < kSums; ++which) {
      partial_[which].resize(channels * static_cast<size_t>(tiling_.position_tiles));
      total_[which].resize(channels);
    }
  }

  template <class Parallel>
  void run(int64_t threads, const Parallel& parallel) {
    two_passes(tiling_, *this, threads, parallel);
  }

  void first(const Tile& tile) {
    for_blocks(this->shape, tile, [&](const Block& block) { this->kernels.map_gradients(describe(tile, block)); });
  }

  void between(int64_t unit) {
    this->for_groups(unit, [&](int64_t n, int64_t g) {
      const int64_t channels = this->shape.group_channels(), start = n * this->shape.channels + g * channels;
      double grad = 0, grad_z = 0;
      for (int64_t i = start; i < start + channels; ++i) {
        add_up(i);
        const double w = weight_[static_cast<size_t>(i % this->shape.channels)];
        grad += w * total_[kAffine][static_cast<size_t>(i)];
        grad_z += w * total_[kAffineZ][static_cast<size_t>(i)];
      }
      const double count = static_cast<double>(channels * this->shape.positions);
      std::fill_n(shared_.begin() + start, channels, static_cast<Real>(grad / count));
      std::fill_n(spread_.begin() + start, channels, static_cast<Real>(grad_z / count * rstds_[start]));
    });
  }

  void second(const Tile& tile) {
    if (this->operands.dx.data == nullptr && this->operands.dx2.data == nullptr) return;
    for_blocks(this->shape, tile, [&](const Block& block) { this->kernels.input_gradient(describe(tile, block)); });
  }

  // Σ over positions of every sample and channel, [N, C].
  const std::vector<double>& sums(Sum which) const { return total_[which]; }

 private:
  BackwardBlock<Real> describe(const Tile& tile, const Block& block) {
    const Operands& o = this->operands;
    const int64_t c = block.channel, channel = tile.sample * this->shape.channels + c;
    return {block.rows,
            block.count,
            this->stream(o.x, o.x2, tile, c),
            this->stream(o.grad, tile, c),
            this->stream(o.gamma, tile, c),
            this->stream(o.beta, tile, c),
            &means_[channel],
            &scales_[channel],
            &bias_[c],
            this->options.activation,
            static_cast<Real>(this->options.share),
            this->options.mixed,
            this->stream(o.dgamma, tile, c),
            this->stream(o.dbeta, tile, c),
            {partial(kAffine, tile, c), partial(kAffineZ, tile, c), partial(kT, tile, c), partial(kTAffine, tile, c)},
            tiling_.position_tiles,
            &weight_[c],
            &rstds_[channel],
            &shared_[channel],
            &spread_[channel],
            this->stream(o.dx, o.dx2, tile, c)};
  }

  // [N, C, tiles] where positions are last, [N, tiles, C] where channels are.
  int64_t partial_index(int64_t n, int64_t c, int64_t tile) const {
    const int64_t channels = this->shape.channels, tiles = tiling_.position_tiles;
    return this->shape.channels_last ? (n * tiles + tile) * channels + c : (n * channels + c) * tiles + tile;
  }
  Real* partial(int which, const Tile& tile, int64_t c) {
    return &partial_[which][partial_index(tile.sample, c, tile.position / tiling_.positions)];
  }
  void add_up(int64_t i) {
    const int64_t n = i / this->shape.channels, c = i % this->shape.channels;
    for (int which = 0; which < kSums; ++which) {
      double sum = 0;
      for (int64_t tile = 0; tile < tiling_.position_tiles; ++tile)
        sum += partial_[which][partial_index(n, c, tile)];
      total_[which][i] = which == kAffineZ ? sum * rstds_[i] : sum;  // of ẑ, no longer of x − μ
    }
  }

  Tiling tiling_;
  std::vector<Real> weight_, bias_;                                // [C]
  std::vector<Real> means_, rstds_, scales_, shared_, spread_;     // [N, C]
  std::vector<Real> partial_[kSums];
  std::vector<double> total_[kSums];                               // [N, C]
};

}  // namespace ragsr::sft
