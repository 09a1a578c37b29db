// group_norm_sft on the CPU, forward and backward, free of torch.
//
//     sft_row.h       what a kernel is told about a block of rows
//     sft_rows.h      the arithmetic along them, sft_vectors.h: float32 vectors, sft_targets.h: both per instruction set
//     sft_backward.h  the backward
//
// The maps [N, C, P] are cut into tiles that depend on the shape alone, and what is summed is summed tile by tile in
// their order: the result has the same bits on any number of threads.
//
//     contiguous      a unit is one group; a tile is some of its channels, or of long ones a part
//     channels-last   a unit is one sample; a tile is some positions with all their channels
//
// Each unit is passed over twice with its groups' sums between. With more units than threads one thread does both passes
// of a unit, so that the second finds it in the cache; else the tiles of a pass are shared among the threads, and each gets
// those of the first pass again. Both passes go upwards, which is what caches read ahead for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
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

// Elements of a tile of whole rows, about: 128 KiB of float32, small beside a second cache.
constexpr int64_t kTile = 1 << 15;

struct Tiling {
  explicit Tiling(const Shape& shape) : shape(shape) {
    const int64_t p = std::max<int64_t>(1, shape.positions);
    units = shape.channels_last ? shape.batch : shape.batch * shape.groups;
    unit_channels = shape.channels_last ? shape.channels : shape.group_channels();
    const int64_t shares = std::max<int64_t>(1, divide_up(unit_channels * p, kTile));
    channels = shape.channels_last ? shape.channels : std::max<int64_t>(1, divide_up(unit_channels, shares));
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

// Rows of a tile that lie on one side of the seam between x and x2.
struct Block {
  int64_t channel;      // the first
  int64_t rows, count;  // elements of a row
};

template <class F>
void for_blocks(const Shape& shape, const Tile& tile, const F& f) {
  const int64_t end = tile.channel + tile.channels, seam = std::clamp(shape.first, tile.channel, end);
  for (const auto& [from, to] : {std::pair{tile.channel, seam}, std::pair{seam, end}}) {
    if (from == to) continue;
    shape.channels_last ? f(Block{from, tile.positions, to - from}) : f(Block{from, to - from, tile.positions});
  }
}

// What both directions know: where an operand's row lies, and what is constant along it.
template <class Real>
class Rows {
 public:
  Rows(const Kernels<Real>& kernels, const Shape& shape, const Operands& operands, const Options& options)
      : kernels(kernels), shape(shape), operands(operands), options(options) {}

 protected:
  Stream stream(const Map& map, const Tile& tile, int64_t channel) const {
    if (map.data == nullptr) return {};
    const int64_t offset = tile.sample * map.batch + channel * map.channel + tile.position * map.position;
    void* at = static_cast<char*>(map.data) + offset * static_cast<int64_t>(kernels.element);
    return shape.channels_last ? Stream{at, map.channel, map.position} : Stream{at, map.position, map.channel};
  }
  // Of an operand that is split at the seam.
  Stream stream(const Map& one, const Map& two, const Tile& tile, int64_t channel) const {
    return channel < shape.first ? stream(one, tile, channel) : stream(two, tile, channel - shape.first);
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
    for_blocks(this->shape, tile, [&](const Block& block) {
      const Operands& o = this->operands;
      const int64_t c = block.channel, channel = tile.sample * this->shape.channels + c;
      this->kernels.modulate({block.rows,
                              block.count,
                              this->stream(o.x, o.x2, tile, c),
                              this->stream(o.gamma, tile, c),
                              this->stream(o.beta, tile, c),
                              this->stream(o.residual, tile, c),
                              this->stream(o.out, tile, c),
                              &means_[channel],
                              &scales_[channel],
                              &bias_[c],
                              this->options.activation,
                              static_cast<Real>(this->options.share),
                              this->options.mixed});
    });
  }

 private:
  static constexpr int64_t kSample = 16;

  void measure_group(const Tile& tile) {
    double sum = 0, square = 0;
    const auto measure = [&](const Tile& part, Real centre) {
      sum = square = 0;
      for_blocks(this->shape, part, [&](const Block& block) {
        const Stream x = this->stream(this->operands.x, this->operands.x2, part, block.channel);
        double more, more_squares;
        this->kernels.measure(x, block.rows, block.count, centre, &more, &more_squares);
        sum += more;
        square += more_squares;
      });
    };
    const Tile beginning = sixteenth(tile);
    measure(beginning, 0);
    const Real centre = static_cast<Real>(sum / static_cast<double>(beginning.elements()));
    measure(tile, centre);
    moments_[0][tile.index] = centre;
    moments_[1][tile.index] = static_cast<Real>(sum);
    moments_[2][tile.index] = static_cast<Real>(square);
  }

  // The first rows of a tile, or a part of the first one, in whole vectors: what is read next anyway.
  static Tile sixteenth(const Tile& tile) {
    Tile part = tile;
    part.channels = divide_up(tile.channels, kSample);
    if (part.channels == 1)
      part.positions = std::min(tile.positions, divide_up(tile.elements(), kSample * kSample) * kSample);
    return part;
  }

  void measure_channels(const Tile& tile) {
    const int64_t start = tile.index * this->shape.channels;
    Real *centres = &moments_[0][start], *sums = &moments_[1][start], *squares = &moments_[2][start];
    const auto add = [&](int64_t positions) {
      for_blocks(this->shape, tile, [&](const Block& block) {
        const int64_t c = block.channel;
        const Stream x = this->stream(this->operands.x, this->operands.x2, tile, c);
        this->kernels.measure_channels(x, positions, block.count, centres + c, sums + c, squares + c);
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
