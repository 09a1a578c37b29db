// Runs the tiles, moments and blends of csrc/cpu without torch, in memory that ends where the tensors end, against sums in
// double: for sanitizers.
//
//     c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc tests/csrc/tokens_driver.cpp
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "cpu/align.h"
#include "cpu/attention.h"

namespace {

using namespace ragsr;

std::mt19937 generator(1);

// [tokens, channels] in memory of its own: tokens or channels first, dense or with gaps of NaN.
struct Features {
  Tokens<float> view;
  std::unique_ptr<float[]> memory;

  Features(int64_t tokens, int64_t channels, bool channels_first, int64_t gap) {
    const int64_t step = 1 + gap;
    view = {nullptr, tokens, channels, channels_first ? step : channels * step, channels_first ? tokens * step : step};
    const int64_t size = (tokens - 1) * view.token_stride + (channels - 1) * view.channel_stride + 1;
    memory.reset(new float[static_cast<size_t>(size)]);
    std::fill_n(memory.get(), size, std::nanf(""));
    view.data = memory.get();
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t c = 0; c < channels; ++c) at(i, c) = std::normal_distribution<float>(static_cast<float>(c))(generator);
  }

  float& at(int64_t i, int64_t c) const { return view.data[i * view.token_stride + c * view.channel_stride]; }
  Tokens<const float> read() const {
    return {view.data, view.tokens, view.channels, view.token_stride, view.channel_stride};
  }

  double mean(int64_t c) const {
    double sum = 0;
    for (int64_t i = 0; i < view.tokens; ++i) sum += at(i, c);
    return sum / static_cast<double>(view.tokens);
  }
  double deviation(int64_t c) const {
    double sum = 0;
    for (int64_t i = 0; i < view.tokens; ++i) sum += (at(i, c) - mean(c)) * (at(i, c) - mean(c));
    return std::sqrt(sum / static_cast<double>(std::max<int64_t>(view.tokens - 1, 1)) + 1e-5);
  }
};

void expect(const char* what, double found, double wanted, const Features& of) {
  if (std::abs(found - wanted) <= 1e-4 * (1 + std::abs(wanted))) return;
  std::printf("%s of %ld x %ld: %g where %g is right\n", what, long(of.view.tokens), long(of.view.channels), found, wanted);
  std::exit(1);
}

void check_align(const Features& x, const Features& style, const Features& out) {
  const auto rows = [](const Features& of) {
    return [&of](int64_t, int64_t tile, float* room) { return read_tile(of.read(), tile, room); };
  };
  align<float>(1, x.view.tokens, style.view.tokens, x.view.channels, rows(x), rows(style),
               [&](int64_t) { return out.view; },
               [](int64_t tasks, const auto& body) { body(0, tasks); });
  for (int64_t c = 0; c < x.view.channels; ++c)
    for (int64_t i = 0; i < x.view.tokens; ++i) {
      const double wanted = (x.at(i, c) - x.mean(c)) / x.deviation(c) * style.deviation(c) + style.mean(c);
      expect("AdaIN", out.at(i, c), wanted, x);
    }
}

void check_directions(const Features& x) {
  const int64_t channels = x.view.channels;
  std::vector<double> found(static_cast<size_t>(channels)), wanted(found);
  for (int64_t tile = 0; tile < tiles_of(x.view.tokens); ++tile) {
    std::vector<float> room(static_cast<size_t>(kTileTokens * channels)), sum(static_cast<size_t>(channels));
    sum_directions(read_tile(x.read(), tile, room.data()), channels, sum.data());
    for (int64_t c = 0; c < channels; ++c) found[c] += sum[c];
  }
  for (int64_t i = 0; i < x.view.tokens; ++i) {
    double length = 0;
    for (int64_t c = 0; c < channels; ++c) length += x.at(i, c) * x.at(i, c);
    for (int64_t c = 0; c < channels; ++c) wanted[c] += x.at(i, c) / (std::sqrt(length) + 1e-8);
  }
  for (int64_t c = 0; c < channels; ++c) expect("sum of directions", found[c], wanted[c], x);
}

// Two references into a blend: the first begins it, the second is added.
void check_blend(const Features& own, const Features& ref, const Features& fused) {
  const int64_t tokens = own.view.tokens, channels = own.view.channels;
  const std::unique_ptr<float[]> gate(new float[static_cast<size_t>(2 * tokens)]);
  for (int64_t i = 0; i < tokens; ++i) gate[i] = static_cast<float>(i % 3) / 4, gate[tokens + i] = gate[i] / 2;
  const Gates<float> gates{gate.get(), 2, tokens, tokens, 1};
  std::vector<float> room(static_cast<size_t>(kTileTokens * channels)), rest(room);
  for (int64_t tile = 0; tile < tiles_of(tokens); ++tile) {
    const TileRows<float> theirs = read_tile(ref.read(), tile, room.data());
    start_blend(read_tile(own.read(), tile, rest.data()), theirs, gates, tile, fused.view);
    add_reference(theirs, gates, 1, tile, fused.view);
  }
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      const double weight = 1.5 * gate[i];
      expect("blend", fused.at(i, c), (1 - weight) * own.at(i, c) + weight * ref.at(i, c), own);
    }
  if (any_open(gates) != (tokens > 1)) std::printf("any_open is wrong\n"), std::exit(1);
}

}  // namespace

int main() {
  int cases = 0;
  for (int64_t tokens : {1, 2, 63, 64, 65, 200})
    for (int64_t channels : {1, 7, 16, 40})
      for (bool channels_first : {false, true})
        for (int64_t gap : {0, 1}) {
          const Features x(tokens, channels, channels_first, gap), style(37, channels, !channels_first, gap);
          const Features other(tokens, channels, !channels_first, 1 - gap);
          check_directions(x);
          check_blend(x, other, Features(tokens, channels, channels_first, 1 - gap));
          check_align(x, style, other);
          ++cases;
        }
  std::printf("%d cases\n", cases);
}
