// group_norm_sft_forward on a GPU: which kernels, over which pieces.
//
//     block      a block holds a group: x is read once                            sft_held.h
//     cluster    a cluster of 2, 4 or 8 blocks does, sm_90 and later              "
//     grid       any number of blocks do, all on the chip at once                 "
//     split      statistics of parts, then the result: x is read twice            sft_kernels.h
//
// Of those that are possible the plan takes the one in which a processor has the least to move; waiting and further
// launches count as what could have been moved meanwhile. 16-bit features in 32 groups, NCHW; teams in brackets:
//
//     [B, C, H, W]            MB     H100, H200      A100           RTX 4090       MB moved: held    split
//     1, 1280, 8, 8          0.2     block           block          block                   0.7      0.8
//     2, 640, 32, 32         2.6     cluster [4]     block          block                  10.5     13.1
//     1, 320, 64, 64         2.6     cluster [8]     split          split                  10.5     13.1
//     2, 320, 64, 64         5.2     cluster [4]     block          split                  21.0     26.2
//     8, 320, 64, 64        21.0     block           block          block                  83.9    104.9
//     2, 320, 128, 128      21.0     cluster [4]     grid [6]       grid [8]               83.9    104.9
//     1, 256, 256, 256      33.6     cluster [8]     grid [13]      grid [32]             134.2    167.8
//     1, 128, 512, 512      67.1     grid [33]       grid [27]      grid [64]             268.4    335.5
//     1, 128, 1024, 1024   268.4     grid [132]      grid [108]     grid [128]           1073.7   1342.2
//
// Held, x, γ, β and the result are moved once: 8 bytes an element; split, x is read again: 10, of which L2 gives 2
// where x stays in it. The constants are derived from data sheets and were not measured yet. `Device` launches kernels
// and lends memory; the tests have one that runs on the host.
#pragma once

#include <optional>

#include "sft_held.h"

namespace ragsr::gpu {

enum class Regime : int { block, cluster, grid, split };

struct Chip {
  int processors;
  int64_t block_shared, shared;  // shared memory that a block may ask for, and that a processor has
  int64_t cache;                 // bytes of L2
  bool clusters, cooperative;    // can launch them
};

// What is held together, and where it may be cut.
struct Bundles {
  int64_t count, together;  // together: groups of a bundle
  int64_t vectors, unit;    // vectors of a bundle; a block holds a multiple of `unit`
  int64_t vector_bytes;
  int across, segments;  // channels-last: vectors of a position, and groups that one vector meets at most; else 0
  int64_t moments_bytes, totals_bytes;
};

template <int V, Along A, class T, class Real>
Bundles bundles_of(int64_t batch, int64_t groups, int64_t members, int64_t positions) {
  Bundles n{batch * groups, 1, 0, 1, V * static_cast<int64_t>(sizeof(T)), 0, 0,
            static_cast<int64_t>(sizeof(Moments<Real>)), static_cast<int64_t>(sizeof(Total<Real>))};
  while (A == Along::channels && n.together * members % V != 0) ++n.together;  // divides `groups`, as V the channels
  n.count /= n.together;
  n.vectors = n.together * members * positions / V;
  n.unit = 128 / n.vector_bytes;  // a line of memory
  if (A == Along::positions) return n;
  n.across = static_cast<int>(n.together * members / V);
  n.unit = n.across;
  for (int64_t column = 0; column < n.across; ++column) {
    const int64_t met = ((column + 1) * V - 1) / members - column * V / members + 1;
    n.segments = std::max(n.segments, static_cast<int>(met));
  }
  return n;
}

// How a launch holds bundles.
struct Plan {
  Regime regime = Regime::split;
  int64_t size = 1, blocks = 0, share = 0;  // blocks of a team and of the launch; vectors of a block
  int threads = 0;
  int64_t shared = 0;        // bytes of a block
  int64_t cost = INT64_MAX;  // bytes that a processor moves or could have moved; this much: not possible
};

// Bytes that a processor of an H100 moves meanwhile, at 25 a nanosecond.
constexpr int64_t kBlockWait = 8 << 10;  // threads of a block for one another
constexpr int64_t kClusterWait = 16 << 10;
constexpr int64_t kGridWait = 40 << 10;
constexpr int64_t kLaunch = 25 << 10;  // of a further kernel; of a cooperative one, and of clearing its counters

constexpr int64_t kPasses = 4;           // over x, γ, β and the result
constexpr int64_t kLeastShare = 4 << 10;  // bytes of a block of a team; less is all waiting
constexpr int64_t kOwnShared = 1 << 10;  // what the system keeps per block

// `size` blocks hold a bundle, `beside` blocks share a processor; no threads: that is not possible.
inline Plan team_of(const Bundles& n, const Chip& chip, int64_t size, int beside) {
  Plan plan;
  plan.size = size;
  plan.share = ceil_div(ceil_div(n.vectors, size), n.unit) * n.unit;
  const int64_t most = kMostThreads / beside, step = n.across ? n.across : kWarp;
  const int64_t wanted = std::clamp<int64_t>(ceil_div(plan.share, kInFlight), 2 * kWarp, most);
  const int64_t threads = std::min(ceil_div(wanted, step), most / step) * step;
  const int64_t slots = n.across ? threads * n.segments : threads / kWarp;
  plan.shared = (plan.share * n.vector_bytes + 15) / 16 * 16 + (slots + n.together) * n.moments_bytes +
                n.together * n.totals_bytes;
  if (plan.shared <= chip.block_shared && beside * (plan.shared + kOwnShared) <= chip.shared)
    plan.threads = static_cast<int>(threads);
  return plan;
}

// The busiest processor moves `shares`, the last of them with the memory almost to itself: half of what it has more
// than the mean counts. It waits `rounds` times, but moves for one team while another waits.
inline int64_t cost_of(const Plan& plan, const Bundles& n, const Chip& chip, int64_t shares, int64_t rounds,
                       int64_t wait, int64_t overlap) {
  const int64_t mean = n.count * n.vectors * n.vector_bytes / chip.processors;
  return kPasses * (mean + shares * plan.share * n.vector_bytes) / 2 + rounds * wait / overlap;
}

// Teams that need not be on the chip together: one for every bundle.
inline Plan free_plan(const Bundles& n, const Chip& chip, int64_t size, int beside) {
  Plan plan = team_of(n, chip, size, beside);
  if (plan.threads == 0 || size > chip.processors) return {};
  plan.regime = size == 1 ? Regime::block : Regime::cluster;
  plan.blocks = n.count * size;
  const int64_t shares = ceil_div(n.count, chip.processors / size), rounds = ceil_div(shares, beside);
  const int64_t wait = size == 1 ? kBlockWait : kClusterWait;
  plan.cost = cost_of(plan, n, chip, shares, rounds, wait, std::min<int64_t>(shares, beside));
  return plan;
}

// Teams that are on the chip together and take `rounds` to do all bundles.
inline Plan grid_plan(const Bundles& n, const Chip& chip, int64_t rounds, int beside) {
  const int64_t teams = ceil_div(n.count, rounds), room = int64_t{chip.processors} * beside;
  if (teams > room) return {};
  const int64_t most = std::max<int64_t>(1, n.vectors * n.vector_bytes / kLeastShare);
  Plan plan = team_of(n, chip, std::min(room / teams, most), beside);
  if (plan.threads == 0) return {};
  plan.regime = Regime::grid;
  plan.blocks = teams * plan.size;
  const int64_t shares = rounds * ceil_div(plan.blocks, chip.processors);
  plan.cost = cost_of(plan, n, chip, shares, rounds, kGridWait, std::min({shares / rounds, int64_t{beside}, teams}));
  plan.cost += 2 * kLaunch;
  return plan;
}

inline Plan split_plan(const Bundles& n, const Chip& chip) {
  const int64_t bytes = n.count * n.vectors * n.vector_bytes;
  const int64_t again = bytes <= chip.cache / 2 ? bytes / 2 : bytes;  // from L2 it comes twice as fast
  Plan plan;
  plan.cost = (kPasses * bytes + again) / chip.processors + 2 * kLaunch;
  return plan;
}

// The best plan, or the best of one regime, with no threads if that is not possible.
inline Plan plan_of(const Bundles& n, const Chip& chip, std::optional<Regime> only = std::nullopt) {
  const auto allowed = [&](Regime regime) { return !only || *only == regime; };
  Plan best;
  const auto offer = [&](const Plan& plan) {
    if (plan.cost < best.cost) best = plan;
  };
  if (allowed(Regime::split)) offer(split_plan(n, chip));
  for (const int beside : {1, 2}) {
    if (allowed(Regime::block)) offer(free_plan(n, chip, 1, beside));
    for (int64_t size = 2; chip.clusters && allowed(Regime::cluster) && size <= 8; size *= 2)
      if (only || n.vectors * n.vector_bytes >= size * kLeastShare) offer(free_plan(n, chip, size, beside));
    const bool grids = chip.cooperative && allowed(Regime::grid);
    for (int64_t rounds = 1; grids && rounds <= n.count && rounds * kGridWait / beside < best.cost; ++rounds)
      offer(grid_plan(n, chip, rounds, beside));
  }
  return best;
}

// ---------------------------------------------------------------- launches

template <int V, Along A, class T, class Real, class Device>
void run_split(Device& device, const Problem<T, Real>& k) {
  const Parts parts = parts_of<V, A>(k.batch, k.channels, k.positions, device.chip().processors);
  const int64_t count = k.batch * k.channels * parts.splits;  // of moments: [B, C, S]
  auto* means = static_cast<Real*>(device.lend(2 * count * static_cast<int64_t>(sizeof(Real))));
  Real* m2s = means + count;
  const int64_t blocks = k.batch * parts.blocks * parts.splits;
  device.launch(statistics_kernel<V, A, T, Real>, blocks, kThreads, k, parts, means, m2s);
  device.launch(merge_kernel<T, Real>, k.batch * k.groups, kThreads, k, parts, means, m2s);
  device.launch(apply_kernel<V, A, T, Real>, ceil_div(k.batch * k.channels * k.positions / V, kThreads), kThreads, k);
}

// false: the device refuses
template <int V, Along A, class T, class Real, class Device>
bool run_held(Device& device, const Problem<T, Real>& k, const Bundles& n, const Plan& plan) {
  const Wait waits[] = {Wait::nobody, Wait::cluster, Wait::grid};
  Sharing<Real> s{n.count, static_cast<int>(n.together), static_cast<int>(plan.size), static_cast<int>(plan.share),
                  n.across, n.segments, waits[static_cast<int>(plan.regime)], nullptr, nullptr};
  if (!device.takes(held_kernel<V, A, T, Real>, plan)) return false;
  if (plan.regime == Regime::grid) {
    const int64_t parts = n.count * n.together * plan.size * n.moments_bytes;
    const int64_t counters = n.count * static_cast<int64_t>(sizeof(unsigned));
    auto* memory = static_cast<unsigned char*>(device.lend(parts + counters));
    s.parts = reinterpret_cast<Moments<Real>*>(memory);
    s.arrived = reinterpret_cast<unsigned*>(memory + parts);
    device.clear(s.arrived, counters);
  }
  return device.launch_team(held_kernel<V, A, T, Real>, plan, k, s);
}

// false: `only` is not possible here
template <int V, Along A, class T, class Real, class Device>
bool group_norm_sft(Device& device, const Problem<T, Real>& k, std::optional<Regime> only = std::nullopt) {
  const Bundles n = bundles_of<V, A, T, Real>(k.batch, k.groups, k.members, k.positions);
  const Plan plan = plan_of(n, device.chip(), only);
  if (plan.regime != Regime::split && run_held<V, A>(device, k, n, plan)) return true;
  if (only.value_or(Regime::split) != Regime::split) return false;
  run_split<V, A>(device, k);
  return true;
}

}  // namespace ragsr::gpu
