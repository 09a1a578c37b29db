// Runs the CUDA kernels of group_norm_sft_forward on the host (cuda_on_host.h), in each regime of their plan, against
// sums in double; and checks which regime the plan takes where. Needs neither CUDA nor torch:
//
//     c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all tests/csrc/sft_cuda_driver.cpp
//
// With the argument `plans`: what the plan takes on some GPUs, and the bytes that moves.
#include <cmath>

#include "cuda_on_host.h"

#include "../../csrc/cuda/sft_plan.h"

namespace {

using namespace ragsr::gpu;

std::mt19937 generator(1);

const char* const kNames[] = {"block", "cluster", "grid", "split"};

// A small GPU, and what it lends is full of nonsense.
struct HostDevice {
  Chip small{4, 6 << 10, 12 << 10, 0, true, true};
  bool refuses = false;
  std::vector<std::unique_ptr<uint64_t[]>> lent;
  Plan last;  // that a team was launched by

  const Chip& chip() const { return small; }
  void* lend(int64_t bytes) {
    const auto words = static_cast<size_t>((bytes + 7) / 8);
    lent.emplace_back(new uint64_t[words]);
    std::memset(lent.back().get(), 0xCD, words * 8);
    return lent.back().get();
  }
  void clear(void* memory, int64_t bytes) { std::memset(memory, 0, static_cast<size_t>(bytes)); }
  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, int64_t blocks, int threads, const Arguments&... arguments) {
    emulation::launch(kernel, blocks, threads, 0, arguments...);
  }
  template <class Kernel>
  bool takes(Kernel, const Plan&) const {
    return !refuses;
  }
  template <class Kernel, class... Arguments>
  bool launch_team(Kernel kernel, const Plan& plan, const Arguments&... arguments) {
    last = plan;
    const int64_t at_once = plan.regime == Regime::grid ? plan.blocks : plan.size;
    emulation::launch_some(kernel, plan.blocks, at_once, plan.regime == Regime::cluster ? plan.size : 1, plan.threads,
                           static_cast<int>(plan.shared), arguments...);
    return true;
  }
};

struct Case {
  int64_t batch, channels1, channels2, positions, groups;
  bool residual, mixed, constant_maps;
  Activation activation;
  float shift;  // of the mean

  int64_t channels() const { return channels1 + channels2; }
};

// Features in their own memory, exactly as large as they are, so that a sanitizer sees one element too many.
template <class T>
struct Features {
  Features(int64_t batch, int64_t channels, int64_t positions, Along along, float shift = 0)
      : memory(new (std::align_val_t{16}) T[static_cast<size_t>(batch * channels * positions)]) {
    std::normal_distribution<float> normal(shift);
    for (int64_t i = 0; i < batch * channels * positions; ++i) memory[i] = static_cast<T>(normal(generator));
    const bool last = along == Along::channels;
    view = {memory, channels * positions, last ? 1 : positions, last ? channels : 1, true};
  }
  Features(const Features&) = delete;
  ~Features() { ::operator delete[](memory, std::align_val_t{16}); }
  View<const T> read() const { return {view.data, view.batch, view.channel, view.position, view.dense}; }

  T* memory;
  View<T> view;
};

[[noreturn]] void fail(const char* what, const Case& c, Regime regime, double found, double wanted) {
  std::printf("%s, %s: %g where %g is right: batch %ld channels %ld + %ld positions %ld groups %ld\n",
              kNames[static_cast<int>(regime)], what, found, wanted, long(c.batch), long(c.channels1),
              long(c.channels2), long(c.positions), long(c.groups));
  std::exit(1);
}

// ---------------------------------------------------------------- the truth, in double

template <class T, class Real>
double input_at(const Problem<T, Real>& k, int64_t b, int64_t c, int64_t p) {
  return double(read_joined<1, Along::positions, false>(k, b, c, p).at[0]);
}

template <class T, class Real>
Moments<double> exact(const Problem<T, Real>& k, int64_t b, int64_t group) {
  double sum = 0, squares = 0;
  const auto over_group = [&](const auto& f) {
    for (int64_t c = group * k.members; c < (group + 1) * k.members; ++c)
      for (int64_t p = 0; p < k.positions; ++p) f(input_at(k, b, c, p));
  };
  over_group([&](double z) { sum += z; });
  const double count = double(k.members * k.positions), mean = sum / count;
  over_group([&](double z) { squares += (z - mean) * (z - mean); });
  return {count, mean, squares};
}

template <class T, class Real>
double exact(const Problem<T, Real>& k, const Moments<double>& group, int64_t b, int64_t c, int64_t p) {
  const auto at = [&](const View<const T>& view) { return double(*view.at(b, c, p)); };
  const double z = input_at(k, b, c, p), z_hat = (z - group.mean) / std::sqrt(group.m2 / group.count + double(k.eps));
  double y = (z_hat * double(*k.weight.at(0, c, 0)) + double(*k.bias.at(0, c, 0))) * (1 + at(k.gamma)) + at(k.beta);
  if (k.activation == Activation::silu) y *= 1 / (1 + std::exp(-y));
  if (k.activation == Activation::relu) y = std::max(y, 0.0);
  if (k.mixed) y = double(k.share) * y + (1 - double(k.share)) * z;
  return y + (k.residual.data ? at(k.residual) : 0);
}

// ---------------------------------------------------------------- one case

template <class T, class Real>
void check_results(const Case& c, const Problem<T, Real>& k, Regime regime) {
  const double result = sizeof(T) == 2 ? 2e-3 : 1e-5 * (1 + std::abs(double(c.shift)));
  const auto close = [&](const char* what, double found, double wanted, double tolerance) {
    if (!(std::abs(found - wanted) <= tolerance * (1 + std::abs(wanted)))) fail(what, c, regime, found, wanted);
  };
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t group = 0; group < k.groups; ++group) {
      const Moments<double> wanted = exact(k, b, group);
      close("mean", double(k.mean[b * k.groups + group]), wanted.mean, 5e-7);
      const double rstd = 1 / std::sqrt(wanted.m2 / wanted.count + double(k.eps));
      close("rstd", double(k.rstd[b * k.groups + group]), rstd, 1e-4);
      for (int64_t channel = group * k.members; channel < (group + 1) * k.members; ++channel)
        for (int64_t p = 0; p < k.positions; ++p)
          close("result", double(*k.out.at(b, channel, p)), exact(k, wanted, b, channel, p), result);
    }
}

// In every regime that is possible, twice: the same bits, though threads take their turns in another order.
template <int V, Along A, class T, class Real>
int check(const Case& c, std::vector<bool>& seen) {
  const int64_t n = c.channels();
  const Features<T> x(c.batch, c.channels1, c.positions, A, c.shift), x2(c.batch, c.channels2, c.positions, A, c.shift);
  const Features<T> both(c.batch, 2 * n, c.positions, A), residual(c.batch, n, c.positions, A);
  const Features<T> out(c.batch, n, c.positions, A), again(c.batch, n, c.positions, A);
  const Features<T> weight(1, n, 1, Along::channels), bias(1, n, 1, Along::channels);
  View<const T> gamma = both.read(), beta = both.read();  // halves of one convolution's output
  beta.data = beta.at(0, n, 0);
  if (c.constant_maps) gamma.position = beta.position = 0, gamma.dense = beta.dense = A == Along::channels;
  const auto statistics = static_cast<size_t>(c.batch * c.groups);
  int runs = 0;
  for (const Regime regime : {Regime::block, Regime::cluster, Regime::grid, Regime::split}) {
    std::vector<Real> mean(statistics, NAN), rstd(statistics, NAN);
    Problem<T, Real> k{
        x.read(), x2.read(), gamma, beta, c.residual ? residual.read() : View<const T>{}, out.view,
        weight.read(), bias.read(), mean.data(), rstd.data(), c.batch, c.channels1, n, c.positions,
        c.groups, n / c.groups, Real(1e-5), c.mixed ? Real(0.3) : Real(1), c.mixed, c.activation};
    HostDevice device;
    const auto bytes = static_cast<size_t>(c.batch * n * c.positions) * sizeof(T);
    std::memset(static_cast<void*>(out.memory), 0xFF, bytes);
    if (!group_norm_sft<V, A>(device, k, regime)) continue;
    check_results(c, k, regime);
    k.out = again.view;
    const std::vector<Real> first = mean;
    if (!group_norm_sft<V, A>(device, k, regime) || std::memcmp(out.memory, again.memory, bytes) != 0 || first != mean)
      fail("other bits", c, regime, 0, 0);
    seen[static_cast<size_t>(regime)] = true;
    ++runs;
  }
  return runs;
}

template <class T, class Real>
int check_layouts(const Case& c, std::vector<bool>& seen) {
  constexpr int V = 16 / sizeof(T);
  int runs = check<1, Along::positions, T, Real>(c, seen);
  if (c.positions % V == 0) runs += check<V, Along::positions, T, Real>(c, seen);
  if (c.channels1 % V == 0 && c.channels() % V == 0) runs += check<V, Along::channels, T, Real>(c, seen);
  return runs;
}

int check_all(std::vector<bool>& seen) {
  int runs = 0;
  const auto run = [&](const Case& c) {
    runs += check_layouts<float, float>(c, seen);
    if (c.shift == 0) runs += check_layouts<_Float16, float>(c, seen);
  };
  for (const Activation activation : {Activation::none, Activation::silu, Activation::relu}) {
    const bool flag = activation == Activation::silu;
    run({1, 1, 0, 1, 1, flag, !flag, false, activation, 0});
    run({2, 6, 0, 63, 3, flag, flag, false, activation, 0});
    run({1, 12, 8, 28, 2, !flag, flag, flag, activation, 0});      // 10 channels a group, one across the seam
    run({2, 24, 16, 15, 2, flag, !flag, flag, activation, 1000});  // 20
    run({1, 40, 40, 40, 8, flag, flag, !flag, activation, 0});     // 10, four groups in a bundle of 16-bit elements
    run({1, 20, 40, 36, 2, flag, flag, !flag, activation, 3});     // 30
    run({2, 24, 0, 21, 8, !flag, flag, false, activation, 0});     // 3, several groups in a vector
  }
  run({1, 32, 0, 5000, 2, false, false, true, Activation::none, 1000});  // several parts
  run({3, 8, 8, 260, 2, true, true, false, Activation::silu, 0});        // several rounds of a grid
  runs += check<1, Along::positions, double, double>({2, 6, 0, 63, 3, true, true, false, Activation::silu, 0}, seen);
  return runs;
}

// A device that refuses teams gets parts; asked for teams alone, the op says that it cannot.
bool falls_back() {
  const Features<float> x(1, 4, 8, Along::positions), out(1, 4, 8, Along::positions);
  const Features<float> one(1, 4, 1, Along::channels);
  float mean[1] = {NAN}, rstd[1] = {NAN};
  View<const float> map = one.read();
  map.position = 0;
  const Problem<float, float> k{x.read(), {}, map, map, {}, out.view, map, map, mean, rstd,
                                1, 4, 4, 8, 1, 4, 1e-5f, 1, false, Activation::none};
  HostDevice device;
  device.refuses = true;
  return group_norm_sft<1, Along::positions>(device, k) && device.lent.size() == 1 && mean[0] == mean[0] &&
         !group_norm_sft<1, Along::positions>(device, k, Regime::block);
}

// ---------------------------------------------------------------- plans

struct Gpu {
  const char* name;
  Chip chip;
  double bandwidth;  // of memory, GB/s
};

const Gpu kGpus[] = {
    {"H100", {132, 227 << 10, 228 << 10, 50 << 20, true, true}, 3350},
    {"H200", {132, 227 << 10, 228 << 10, 50 << 20, true, true}, 4800},
    {"A100", {108, 163 << 10, 164 << 10, 40 << 20, false, true}, 1555},
    {"RTX 4090", {128, 99 << 10, 100 << 10, 72 << 20, false, true}, 1008},
};

struct Layer {
  int64_t batch, channels, size;
};

struct Choice {
  Regime regime;
  int64_t size;  // of a team
};

constexpr Choice kBlock{Regime::block, 1}, kSplit{Regime::split, 1};
constexpr Choice cluster(int64_t size) { return {Regime::cluster, size}; }
constexpr Choice grid(int64_t size) { return {Regime::grid, size}; }

// The table of sft_plan.h.
const struct {
  Layer layer;
  Choice hopper, a100, rtx4090;
} kTable[] = {
    {{1, 1280, 8}, kBlock, kBlock, kBlock},
    {{2, 640, 32}, cluster(4), kBlock, kBlock},
    {{1, 320, 64}, cluster(8), kSplit, kSplit},
    {{2, 320, 64}, cluster(4), kBlock, kSplit},
    {{8, 320, 64}, kBlock, kBlock, kBlock},
    {{2, 320, 128}, cluster(4), grid(6), grid(8)},
    {{1, 256, 256}, cluster(8), grid(13), grid(32)},
    {{1, 128, 512}, grid(33), grid(27), grid(64)},
    {{1, 128, 1024}, grid(132), grid(108), grid(128)},
};

template <Along A>
Bundles bundles_of(const Layer& l) {
  return ragsr::gpu::bundles_of<8, A, uint16_t, float>(l.batch, 32, l.channels / 32, l.size * l.size);
}

template <Along A>
void print_plans(const char* layout) {
  for (const auto& row : kTable) {
    const Layer& l = row.layer;
    const double bytes = 2.0 * double(l.batch * l.channels * l.size * l.size);
    std::printf("%ldx%ldx%ldx%ld %s (%.1f MB)\n", long(l.batch), long(l.channels), long(l.size), long(l.size), layout,
                bytes / 1e6);
    for (const Gpu& gpu : kGpus) {
      const Plan plan = plan_of(bundles_of<A>(l), gpu.chip);
      const double moved = bytes * (plan.regime == Regime::split ? 5 : 4);
      std::printf("    %-9s %-8s team %3ld  blocks %5ld  threads %3d  shared %6ld  moves %6.1f MB, %6.1f us\n",
                  gpu.name, kNames[static_cast<int>(plan.regime)], long(plan.size), long(plan.blocks), plan.threads,
                  long(plan.shared), moved / 1e6, moved / gpu.bandwidth / 1e3);
    }
  }
}

// What must hold of any plan that holds groups.
bool sound(const Bundles& n, const Chip& chip, const Plan& plan) {
  if (plan.regime == Regime::split) return true;
  const bool whole = plan.size * plan.share >= n.vectors && plan.share % n.unit == 0;
  const int step = n.across ? n.across : 32;
  const bool threads = plan.threads >= 32 && plan.threads <= kMostThreads && plan.threads % step == 0;
  const int64_t beside = plan.regime == Regime::grid ? ceil_div(plan.blocks, chip.processors) : 1;
  const bool fits = plan.shared <= chip.block_shared && beside * (plan.shared + 1024) <= chip.shared &&
                    beside * plan.threads <= kMostThreads;
  const bool teams = plan.regime == Regime::grid ? plan.blocks % plan.size == 0 : plan.blocks == n.count * plan.size;
  const bool cluster = plan.regime != Regime::cluster || (chip.clusters && plan.size <= 8);
  return whole && threads && fits && teams && cluster && plan.shared >= plan.share * n.vector_bytes;
}

bool table_holds() {
  for (const auto& row : kTable)
    for (const Gpu& gpu : kGpus) {
      const Plan plan = plan_of(bundles_of<Along::positions>(row.layer), gpu.chip);
      const Choice& wanted = gpu.chip.clusters ? row.hopper : gpu.chip.processors == 108 ? row.a100 : row.rtx4090;
      if (plan.regime != wanted.regime || plan.size != wanted.size) {
        std::printf("%s: another plan for %ld x %ld x %ld x %ld\n", gpu.name, long(row.layer.batch),
                    long(row.layer.channels), long(row.layer.size), long(row.layer.size));
        return false;
      }
    }
  return true;
}

bool plans_are_sound() {
  for (const Gpu& gpu : kGpus)
    for (const int64_t batch : {1, 2, 8})
      for (const int64_t channels : {32, 96, 320, 640, 960, 1280, 2560})
        for (const int64_t size : {1, 8, 24, 64, 128, 384, 1024}) {
          const Bundles along[] = {bundles_of<Along::positions>({batch, channels, size}),
                                   bundles_of<Along::channels>({batch, channels, size})};
          for (const Bundles& n : along)
            for (const std::optional<Regime> only :
                 {std::optional<Regime>{}, {Regime::block}, {Regime::cluster}, {Regime::grid}})
              if (!sound(n, gpu.chip, plan_of(n, gpu.chip, only))) {
                std::printf("%s: no sound plan for %ld x %ld x %ld x %ld\n", gpu.name, long(batch), long(channels),
                            long(size), long(size));
                return false;
              }
        }
  return true;
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {
    print_plans<Along::positions>("NCHW");
    print_plans<Along::channels>("channels-last");
    return 0;
  }
  std::vector<bool> seen(4);
  const int runs = check_all(seen);
  if (!plans_are_sound() || !table_holds()) return 1;
  if (!falls_back()) return std::printf("no fall back\n"), 1;
  for (size_t i = 0; i < seen.size(); ++i)
    if (!seen[i]) return std::printf("%s was never run\n", kNames[i]), 1;
  std::printf("%d runs, all right\n", runs);
}
