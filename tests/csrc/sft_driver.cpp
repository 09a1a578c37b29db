// Runs csrc/cuda/sft.h on the host, every thread of every block in turn, against sums in double; without CUDA or torch:
//
//     c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc tests/csrc/sft_driver.cpp
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/sft.h"

namespace {

using namespace ragsr::gpu;

std::mt19937 generator(1);

struct Case {
  int64_t batch, channels1, channels2, positions, groups;
  bool residual, mixed, constant_maps;
  Activation activation;
  float shift;  // of the mean

  int64_t channels() const { return channels1 + channels2; }
};

// Features in their own memory, exactly as large as they are, so that a sanitizer sees one element too many.
struct Features {
  Features(int64_t batch, int64_t channels, int64_t positions, Along along, float shift = 0)
      : values(static_cast<size_t>(batch * channels * positions)) {
    std::normal_distribution<float> normal(shift);
    for (float& value : values) value = normal(generator);
    const bool last = along == Along::channels;
    view = {values.data(), channels * positions, last ? 1 : positions, last ? channels : 1, true};
  }
  View<const float> read() const { return {view.data, view.batch, view.channel, view.position, view.dense}; }

  std::vector<float> values;
  View<float> view;
};

[[noreturn]] void fail(const char* what, const Case& c, double found, double wanted) {
  std::printf("%s: %g where %g is right: batch %ld channels %ld + %ld positions %ld groups %ld\n", what, found, wanted,
              long(c.batch), long(c.channels1), long(c.channels2), long(c.positions), long(c.groups));
  std::exit(1);
}

void close(const char* what, const Case& c, double found, double wanted, double tolerance) {
  if (!(std::abs(found - wanted) <= tolerance * (1 + std::abs(wanted)))) fail(what, c, found, wanted);
}

// As merge_warp and merge_block do: in halves, neighbours of growing distance last.
Moments<float> merge_tree(std::vector<Moments<float>> lanes) {
  for (size_t distance = 16; distance > 0; distance /= 2)
    for (size_t i = 0; i < lanes.size(); ++i)
      if (i % 32 < distance && i + distance < lanes.size()) lanes[i] = merge(lanes[i], lanes[i + distance]);
  Moments<float> sum{};
  for (size_t warp = 0; warp < lanes.size(); warp += 32) sum = merge(sum, lanes[warp]);
  return sum;
}

// Mean and squared deviations of a group in double, from the definition.
Moments<double> exact(const Problem<float, float>& k, int64_t b, int64_t group) {
  double sum = 0, squares = 0;
  const auto over_group = [&](const auto& f) {
    for (int64_t c = group * k.members; c < (group + 1) * k.members; ++c)
      for (int64_t p = 0; p < k.positions; ++p) f(double(read_joined<1, Along::positions, false>(k, b, c, p).at[0]));
  };
  over_group([&](double z) { sum += z; });
  const double count = double(k.members * k.positions), mean = sum / count;
  over_group([&](double z) { squares += (z - mean) * (z - mean); });
  return {count, mean, squares};
}

using Truth = std::vector<Moments<double>>;  // [batch, groups]

Truth exact(const Problem<float, float>& k) {
  Truth truth;
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t group = 0; group < k.groups; ++group) truth.push_back(exact(k, b, group));
  return truth;
}

void check_group(const Case& c, const char* what, const Moments<float>& found, const Moments<double>& wanted) {
  close(what, c, found.count, wanted.count, 0);
  close(what, c, found.mean, wanted.mean, 5e-7);
  close(what, c, found.m2, wanted.m2, 2e-4);
}

// held_kernel: vectors of a group, shared out among the threads
template <int V, Along A>
void check_held(const Case& c, const Problem<float, float>& k, const Truth& truth) {
  if (A == Along::channels && k.members % V) return;
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t group = 0; group < k.groups; ++group) {
      const int64_t threads = 64, vectors = k.members * k.positions / V;
      std::vector<Moments<float>> lanes;
      for (int64_t thread = 0; thread < threads; ++thread) {
        Streams<V, float> streams;
        for (int64_t v = thread; v < vectors; v += threads) {
          int64_t channel, p;
          place<V, A>(v, k.members, k.positions, channel, p);
          streams.add(read_joined<V, A, true>(k, b, group * k.members + channel, p));
        }
        lanes.push_back(streams.all());
      }
      check_group(c, "held", merge_tree(lanes), truth[static_cast<size_t>(b * k.groups + group)]);
    }
}

// statistics_kernel and merge_kernel: channels and parts of the positions
template <int V, Along A>
void check_parts(const Case& c, const Problem<float, float>& k, const Truth& truth) {
  const Parts parts = parts_of<V, A>(k.batch, k.channels, k.positions, 132);
  const int64_t step = A == Along::positions ? kThreads : kThreads / parts.across;
  const int64_t width = A == Along::channels ? V : 1;
  for (int64_t b = 0; b < k.batch; ++b) {
    std::vector<Moments<float>> found(static_cast<size_t>(k.channels * parts.splits));  // [channels, splits]
    for (int64_t channel = 0; channel < k.channels; channel += width)
      for (int64_t split = 0; split < parts.splits; ++split) {
        const int64_t start = split * parts.span, stop = std::min(start + parts.span, k.positions);
        std::vector<Moments<float>> lanes;
        for (int64_t row = 0; row < step; ++row) {
          const auto streams = gather<V, A>(k, b, channel, start, stop, row, step);
          if (A == Along::positions) lanes.push_back(streams.all());
          for (int64_t i = 0; A == Along::channels && i < V; ++i) {
            Moments<float>& sum = found[static_cast<size_t>((channel + i) * parts.splits + split)];
            sum = merge(sum, {streams.count, streams.mean[i], streams.m2[i]});
          }
        }
        if (A == Along::positions) found[static_cast<size_t>(channel * parts.splits + split)] = merge_tree(lanes);
      }
    for (int64_t group = 0; group < k.groups; ++group) {
      std::vector<Moments<float>> lanes(kThreads);
      for (int64_t i = 0; i < k.members * parts.splits; ++i) {
        Moments<float>& lane = lanes[static_cast<size_t>(i % kThreads)];
        lane = merge(lane, found[static_cast<size_t>(group * k.members * parts.splits + i)]);
      }
      check_group(c, "parts", merge_tree(lanes), truth[static_cast<size_t>(b * k.groups + group)]);
    }
  }
}

double wanted_result(const Problem<float, float>& k, const Truth& truth, int64_t b, int64_t c, int64_t p) {
  const auto at = [&](const View<const float>& view) { return double(*view.at(b, c, p)); };
  const Moments<double>& group = truth[static_cast<size_t>(b * k.groups + c / k.members)];
  const double z = read_joined<1, Along::positions, false>(k, b, c, p).at[0];
  const double z_hat = (z - group.mean) / std::sqrt(group.m2 / group.count + k.eps);
  double y = (z_hat * *k.weight.at(0, c, 0) + *k.bias.at(0, c, 0)) * (1 + at(k.gamma)) + at(k.beta);
  if (k.activation == Activation::silu) y *= 1 / (1 + std::exp(-y));
  if (k.activation == Activation::relu) y = std::max(y, 0.0);
  if (k.mixed) y = k.share * y + (1 - k.share) * z;
  return y + (k.residual.data ? at(k.residual) : 0);
}

// apply_kernel: every vector of a sample
template <int V, Along A>
void check_result(const Case& c, const Problem<float, float>& k, const Truth& truth) {
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t v = 0; v < k.channels * k.positions / V; ++v) {
      int64_t channel, p;
      place<V, A>(v, k.channels, k.positions, channel, p);
      const auto group = [&](int i) {
        const int64_t of = (channel + (A == Along::channels ? i : 0)) / k.members;
        return truth[static_cast<size_t>(b * k.groups + of)];
      };
      modulate<V, A>(
          k, b, channel, p, read_joined<V, A, true>(k, b, channel, p), [&](int i) { return float(group(i).mean); },
          [&](int i) { return float(1 / std::sqrt(group(i).m2 / group(i).count + k.eps)); });
    }
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t channel = 0; channel < k.channels; ++channel)
      for (int64_t p = 0; p < k.positions; p += 3)
        close("result", c, *k.out.at(b, channel, p), wanted_result(k, truth, b, channel, p),
              1e-5 * (1 + std::abs(c.shift)));
}

template <int V, Along A>
void check(const Case& c) {
  const int64_t n = c.channels();
  const Features x(c.batch, c.channels1, c.positions, A, c.shift);
  const Features x2(c.batch, c.channels2, c.positions, A, c.shift);
  const Features both(c.batch, 2 * n, c.positions, A), residual(c.batch, n, c.positions, A);
  const Features out(c.batch, n, c.positions, A);
  const Features weight(1, n, 1, Along::channels), bias(1, n, 1, Along::channels);
  View<const float> gamma = both.read(), beta = both.read();  // halves of one convolution's output
  beta.data = beta.at(0, n, 0);
  if (c.constant_maps) gamma.position = beta.position = 0, gamma.dense = beta.dense = A == Along::channels;
  const Problem<float, float> k{
      x.read(), x2.read(), gamma, beta, c.residual ? residual.read() : View<const float>{}, out.view,
      weight.read(), bias.read(), nullptr, nullptr, c.batch, c.channels1, n, c.positions,
      c.groups, n / c.groups, 1e-5f, c.mixed ? 0.3f : 1.f, c.mixed, c.activation};
  const Truth truth = exact(k);
  check_held<V, A>(c, k, truth);
  check_parts<V, A>(c, k, truth);
  check_result<V, A>(c, k, truth);
}

}  // namespace

int main() {
  int cases = 0;
  const auto run = [&](const Case& c) {
    check<1, Along::positions>(c), ++cases;
    if (c.positions % 4 == 0) check<4, Along::positions>(c), ++cases;
    if (c.channels1 % 4 == 0 && c.channels() % 4 == 0) check<4, Along::channels>(c), ++cases;
  };
  for (const Activation activation : {Activation::none, Activation::silu, Activation::relu})
    for (const bool flag : {false, true}) {
      run({1, 1, 0, 1, 1, flag, !flag, false, activation, 0});
      run({2, 6, 0, 63, 3, flag, flag, false, activation, 0});
      run({1, 12, 8, 28, 2, !flag, flag, flag, activation, 0});   // 10 channels a group, one across the seam
      run({2, 24, 16, 15, 2, flag, !flag, flag, activation, 1000});  // 20
      run({1, 20, 40, 36, 2, flag, flag, !flag, activation, 3});   // 30
      run({1, 60, 0, 8, 1, flag, flag, flag, activation, 0});      // 60
    }
  run({1, 32, 0, 20000, 2, false, false, true, Activation::none, 1000});  // several parts
  std::printf("%d cases\n", cases);
}
