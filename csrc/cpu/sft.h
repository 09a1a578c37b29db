// group_norm_sft on the CPU, forward and backward, free of torch.
//
//     sft_row.h       what a kernel is told about one row
//     sft_rows.h      the arithmetic along a row, sft_vectors.h: float32 vectors, sft_targets.h: both per instruction set
//     sft_backward.h  the backward
//
// The maps [N, C, P] are cut into tiles that depend on the shape alone, and what is summed is summed tile by tile in
// their order: the result has the same bits on any number of threads.
//
//     contiguous      a unit is one group; a tile is some of its channels, or a part of a long one
//     channels-last   a unit is one sample; a tile is some positions with all their channels
//
// Each unit is passed over twice with its groups' sums between. With more units than threads one thread does both passes
// of a unit, so that the second finds it in the cache; else the tiles of a pass are shared among the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "sft_row.h"

namespace ragsr::sft {

// One operand [N, C, P] in memory, its strides in elements; null where there is none.
struct Map {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, position = 0;
};

struct Shape {
  int64_t batch, channels, positions, groups;
  int64_t first;       // channels that x has; the others are those of x2
  bool channels_last;  // rows run along channels

  int64_t group_channels() const { return channels / groups; }
};

// The operands of both directions, each null where it has no part.
struct Operands {
  Map x, x2, gamma, beta, residual, out;      // forward
  Map grad, dx, dx2, dgamma, dbeta;           // backward; dgamma and dbeta are null where they are not maps
  const void *weight, *bias;
};

struct Options {
  Activation activation;
  bool mixed;
  double share;  // 1 unless mixed
  double eps;
};

struct Tile {
  int64_t unit, index;  // index: among all tiles
  int64_t sample, channel, channels, position, positions;

  int64_t elements() const { return channels * positions; }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tiling {
  explicit Tiling(const Shape& shape) : shape(shape) {
    const int64_t p = std::max<int64_t>(1, shape.positions);
    units = shape.channels_last ? shape.batch : shape.batch * shape.groups;
    unit_channels = shape.channels_last ? shape.channels : shape.group_channels();
    channels = shape.channels_last ? shape.channels : std::min(unit_channels, kLongestRow / p);
    channels = std::max<int64_t>(1, channels);
    positions = shape.channels_last ? std::clamp<int64_t>(p / 16, 16, 128) : std::min(p, kLongestRow);
    position_tiles = divide_up(shape.positions, positions);
    tiles = divide_up(unit_channels, channels) * position_tiles;
  }

  Tile tile(int64_t unit, int64_t i) const {
    const int64_t c = i / position_tiles * channels, p = i % position_tiles * positions;
    const int64_t first_channel = shape.channels_last ? 0 : unit % shape.groups * unit_channels;
    return {unit, unit * tiles + i, shape.channels_last ? unit : unit / shape.groups, first_channel + c,
            std::min(channels, unit_channels - c), p, std::min(positions, shape.positions - p)};
  }

  Shape shape;
  int64_t units, unit_channels;
  int64_t channels, positions;    // of a tile
  int64_t position_tiles, tiles;  // of a unit
};

// work.first(tile) for the tiles of a unit, work.between(unit), then work.second(tile), for every unit.
template <class Work, class Parallel>
void two_passes(const Tiling& tiling, Work& work, int64_t threads, const Parallel& parallel) {
  const int64_t units = tiling.units, tiles = tiling.tiles, size = tiling.channels * tiling.positions;
  if (units >= 2 * threads) {
    parallel(units, tiles * size, [&](int64_t unit) {
      for (int64_t i = 0; i < tiles; ++i) work.first(tiling.tile(unit, i));
      work.between(unit);
      for (int64_t i = 0; i < tiles; ++i) work.second(tiling.tile(unit, i));
    });
  } else {
    parallel(units * tiles, size, [&](int64_t i) { work.first(tiling.tile(i / tiles, i % tiles)); });
    parallel(units, tiles * size, [&](int64_t unit) { work.between(unit); });
    parallel(units * tiles, size, [&](int64_t i) { work.second(tiling.tile(i / tiles, i % tiles)); });
  }
}

// row(channel, position, count) for the rows of a tile; none crosses the seam between x and x2.
template <class Row>
void for_rows(const Shape& shape, const Tile& tile, const Row& row) {
  if (!shape.channels_last) {
    for (int64_t c = tile.channel; c < tile.channel + tile.channels; ++c) row(c, tile.position, tile.positions);
    return;
  }
  for (int64_t p = tile.position; p < tile.position + tile.positions; ++p) {
    if (shape.first > 0) row(0, p, shape.first);
    if (shape.channels > shape.first) row(shape.first, p, shape.channels - shape.first);
  }
}

// What both directions know: where an operand's row lies, and what is constant along it.
template <class Real>
class Rows {
 public:
  Rows(const Kernels<Real>& kernels, const Shape& shape, const Operands& operands, const Options& options)
      : kernels(kernels), shape(shape), operands(operands), options(options) {}

 protected:
  void* at(const Map& map, const Tile& tile, int64_t c, int64_t p) const {
    if (map.data == nullptr) return nullptr;
    const int64_t offset = tile.sample * map.batch + c * map.channel + p * map.position;
    return static_cast<char*>(map.data) + offset * static_cast<int64_t>(kernels.element);
  }
  Stream stream(const Map& map, const Tile& tile, int64_t c, int64_t p) const {
    return {at(map, tile, c, p), shape.channels_last ? map.channel : map.position};
  }
  // Of an operand that is split at the seam.
  void* at(const Map& one, const Map& two, const Tile& tile, int64_t c, int64_t p) const {
    return c < shape.first ? at(one, tile, c, p) : at(two, tile, c - shape.first, p);
  }
  std::vector<Real> widened(const void* vector) const {
    std::vector<Real> wide(static_cast<size_t>(shape.channels));
    kernels.widen(vector, shape.channels, wide.data());
    return wide;
  }
  // between(sample, group) for the groups of a unit.
  template <class F>
  void for_groups(int64_t unit, const F& f) const {
    if (!shape.channels_last) return f(unit / shape.groups, unit % shape.groups);
    for (int64_t g = 0; g < shape.groups; ++g) f(unit, g);
  }

  const Kernels<Real>& kernels;
  const Shape& shape;
  const Operands& operands;
  const Options& options;
};

// ---------------------------------------------------------------- statistics

// Of some elements: their number, Σ (x − centre) and Σ (x − centre)² about a centre near their mean. Merging them about
// the mean of all loses no digits, however far from zero the elements lie.
template <class Real>
struct Moments {
  int64_t count;
  Real centre, sum, square;

  double total() const { return static_cast<double>(count) * centre + sum; }
  double squares_about(double mean) const {
    const double away = centre - mean;
    return square + away * (2.0 * sum + away * static_cast<double>(count));
  }
};

template <class Real>
double sum_of_lanes(const Real* lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kMostLanes; ++i) sum += lanes[i];
  return sum;
}

// ---------------------------------------------------------------- forward

template <class Real>
class Forward : Rows<Real> {
 public:
  Forward(const Kernels<Real>& kernels, const Shape& shape, const Operands& operands, const Options& options,
          void* mean, void* rstd)  // Real [N, groups]
      : Rows<Real>(kernels, shape, operands, options), tiling_(shape), mean_(static_cast<Real*>(mean)),
        rstd_(static_cast<Real*>(rstd)),
        weight_(this->widened(operands.weight)), bias_(this->widened(operands.bias)) {
    const auto channels = static_cast<size_t>(shape.batch * shape.channels);
    const auto tiles = static_cast<size_t>(tiling_.units * tiling_.tiles);
    means_.resize(channels);
    scales_.resize(channels);
    for (std::vector<Real>& part : moments_)
      part.resize(shape.channels_last ? tiles * static_cast<size_t>(shape.channels) : tiles);
  }

  template <class Parallel>
  void run(int64_t threads, const Parallel& parallel) {
    two_passes(tiling_, *this, threads, parallel);
  }

  // Statistics of a tile about the mean of a sixteenth of it, which lies within four standard deviations of the tile's.
  void first(const Tile& tile) { this->shape.channels_last ? measure_channels(tile) : measure_group(tile); }

  void between(int64_t unit) {
    this->for_groups(unit, [&](int64_t n, int64_t g) { finish_group(n, g); });
  }

  void second(const Tile& tile) {
    for_rows(this->shape, tile, [&](int64_t c, int64_t p, int64_t count) {
      const Operands& o = this->operands;
      const int64_t channel = tile.sample * this->shape.channels + c;
      this->kernels.modulate({count,
                              this->at(o.x, o.x2, tile, c, p),
                              this->stream(o.gamma, tile, c, p),
                              this->stream(o.beta, tile, c, p),
                              this->at(o.residual, tile, c, p),
                              &means_[channel],
                              &scales_[channel],
                              &bias_[c],
                              this->at(o.out, tile, c, p),
                              this->options.activation,
                              static_cast<Real>(this->options.share),
                              this->options.mixed});
    });
  }

 private:
  static constexpr int64_t kSample = 16;

  void measure_group(const Tile& tile) {
    Real centre = 0;
    int64_t sampled = 0;
    Real sums[kMostLanes] = {}, squares[kMostLanes] = {};
    const auto add = [&](int64_t part) {
      for_rows(this->shape, tile, [&](int64_t c, int64_t p, int64_t count) {
        const void* row = this->at(this->operands.x, this->operands.x2, tile, c, p);
        this->kernels.add_positions(row, divide_up(count, part), centre, sums, squares);
        sampled += divide_up(count, part);
      });
    };
    add(kSample);
    centre = static_cast<Real>(sum_of_lanes(sums) / static_cast<double>(sampled));
    for (int64_t i = 0; i < kMostLanes; ++i) sums[i] = squares[i] = 0;
    add(1);
    moments_[0][tile.index] = centre;
    moments_[1][tile.index] = static_cast<Real>(sum_of_lanes(sums));
    moments_[2][tile.index] = static_cast<Real>(sum_of_lanes(squares));
  }

  void measure_channels(const Tile& tile) {
    const int64_t start = tile.index * this->shape.channels;
    Real *centres = &moments_[0][start], *sums = &moments_[1][start], *squares = &moments_[2][start];
    const auto add = [&](int64_t positions) {
      Tile part = tile;
      part.positions = positions;
      for_rows(this->shape, part, [&](int64_t c, int64_t p, int64_t count) {
        const void* row = this->at(this->operands.x, this->operands.x2, tile, c, p);
        this->kernels.add_channels(row, count, centres + c, sums + c, squares + c);
      });
    };
    const int64_t sampled = divide_up(tile.positions, kSample);
    add(sampled);
    for (int64_t c = 0; c < this->shape.channels; ++c) {
      centres[c] = sums[c] / static_cast<Real>(sampled);
      sums[c] = squares[c] = 0;
    }
    add(tile.positions);
  }

  void finish_group(int64_t n, int64_t g) {
    const int64_t channels = this->shape.group_channels();
    const double count = static_cast<double>(channels * this->shape.positions);
    double total = 0, squares = 0;
    for_moments(n, g, [&](const Moments<Real>& m) { total += m.total(); });
    const double mean = total / count;
    for_moments(n, g, [&](const Moments<Real>& m) { squares += m.squares_about(mean); });
    const double rstd = 1 / std::sqrt(squares / count + this->options.eps);
    mean_[n * this->shape.groups + g] = static_cast<Real>(mean);
    rstd_[n * this->shape.groups + g] = static_cast<Real>(rstd);
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      const auto i = static_cast<size_t>(n * this->shape.channels + c);
      means_[i] = static_cast<Real>(mean);
      scales_[i] = static_cast<Real>(rstd * weight_[static_cast<size_t>(c)]);
    }
  }

  template <class F>
  void for_moments(int64_t n, int64_t g, const F& f) const {
    const int64_t unit = this->shape.channels_last ? n : n * this->shape.groups + g;
    const int64_t channels = this->shape.channels_last ? this->shape.group_channels() : 1;
    for (int64_t i = 0; i < tiling_.tiles; ++i) {
      const Tile tile = tiling_.tile(unit, i);
      const int64_t start = this->shape.channels_last ? tile.index * this->shape.channels + g * channels : tile.index;
      for (int64_t j = start; j < start + channels; ++j)
        f({this->shape.channels_last ? tile.positions : tile.elements(), moments_[0][j], moments_[1][j],
           moments_[2][j]});
    }
  }

  Tiling tiling_;
  Real *mean_, *rstd_;
  std::vector<Real> weight_, bias_;      // [C]
  std::vector<Real> means_, scales_;     // [N, C]: μ and w / σ of the channel's group
  std::vector<Real> moments_[3];         // centre, sum, square: [tiles], or [tiles, C] where channels are last
};

}  // namespace ragsr::sft
