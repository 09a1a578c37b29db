// The kernel of group_norm_sft_forward that reads x once: a team of blocks holds a group in shared memory between its
// statistics and the result. csrc/cuda/sft_plan.h says how large teams are.
//
//         block 0 of the team     block 1                 …    a share of the group's vectors each
//     1   read, keep, sum         read, keep, sum              threads -> the block's moments
//     2   ──────────── wait for one another ─────────────      in hardware (cluster) or by counters (grid)
//     3   moments of the group    the same, in the same order: the same bits in every block
//     4   modulate what it kept   modulate what it kept
//
// Along positions a team holds one group. Channels-last, where the vectors of 16 bytes lie across groups, it holds the
// fewest groups side by side that have whole vectors: a bundle. There, a thread always meets the same channels.
#pragma once

#include "sft_kernels.h"
#include "team.h"

namespace ragsr::gpu {

constexpr int kMostThreads = 384;  // of a processor, in one block or two; each may have 168 registers

enum class Wait : int { nobody, cluster, grid };

// How groups are shared out; the numbers of a launch.
template <class Real>
struct Sharing {
  int64_t bundles;
  int together, size, share;  // groups of a bundle, blocks of a team, vectors that each of them holds at most
  int across, segments;       // channels-last: vectors of a position, and groups that one vector meets at most
  Wait wait;
  Moments<Real>* parts;  // grid: [bundles, together, size]
  unsigned* arrived;     // grid: [bundles], 0
};

template <class Real>
struct Total {
  Real mean, rstd;
};

// The shared memory of a block, in this order.
template <class T, class Real>
struct Room {
  static RAGSR_BOTH int held_bytes(int elements) { return (elements * static_cast<int>(sizeof(T)) + 15) / 16 * 16; }

  T* held;
  Total<Real>* totals;   // [together], of all blocks
  Moments<Real>* sums;   // [together], of this block
  Moments<Real>* slots;  // of threads or warps
  __device__ Room(unsigned char* memory, int elements, int together)
      : held(reinterpret_cast<T*>(memory)),
        totals(reinterpret_cast<Total<Real>*>(memory + held_bytes(elements))),
        sums(reinterpret_cast<Moments<Real>*>(totals + together)),
        slots(sums + together) {}
};

// By one warp: items in a fixed order, for lane 0.
template <class Real, class Item>
__device__ Moments<Real> merge_items(int count, const Item& item) {
  Moments<Real> moments{};
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < count; i += kWarp) moments = merge(moments, item(i));
  return merge_warp(moments);
}

// f(group) by a warp for each group of a bundle. A last warp that is not whole has none.
template <class F>
__device__ void by_warps(int together, const F& f) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (warp < warps)
    for (int group = warp; group < together; group += warps) f(group);
}

// ---------------------------------------------------------------- 1: read, keep, sum

// The thread's vectors of the block's `count`, which begin with the bundle's `begin`-th: kAtOnce at a time, first all
// `ask`(slot, channel, position), then all `use`(slot, which), so that all are on their way before one is looked at.
// What is held fits the chip: 32 bits count it.
template <int V, Along A, int kAtOnce, class Ask, class Use>
__device__ void over_vectors(int begin, int count, int channels, int positions, const Ask& ask, const Use& use) {
  const int threads = static_cast<int>(blockDim.x);
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kAtOnce * threads) {
    RAGSR_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      int c, p;
      if (first + j * threads >= count) continue;
      place<V, A>(begin + first + j * threads, channels, positions, c, p);
      ask(j, c, p);
    }
    RAGSR_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * threads < count) use(j, first + j * threads);
  }
}

// Along positions, warps leave moments; channels-last, threads do: of each group that their channels belong to.
template <int V, Along A, class Real>
__device__ void leave(const Streams<V, Real>& streams, const Sharing<Real>& s, int members, Moments<Real>* slots) {
  if constexpr (A == Along::positions) {
    const Moments<Real> moments = merge_warp(streams.all());
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = moments;
  } else {
    Moments<Real>* own = slots + static_cast<int>(threadIdx.x) * s.segments;
    int member = static_cast<int>(threadIdx.x) % s.across * V % members;
    Moments<Real> moments{streams.count, streams.mean[0], streams.m2[0]};
    RAGSR_UNROLL
    for (int i = 1; i < V; ++i) {
      if (++member == members) {
        *own++ = moments;
        moments = {};
        member = 0;
      }
      moments = merge(moments, {streams.count, streams.mean[i], streams.m2[i]});
    }
    *own = moments;
  }
}

// What the block's threads have left of a group of the bundle.
template <int V, Along A, class Real>
__device__ Moments<Real> left_of(int group, const Sharing<Real>& s, int members, const Moments<Real>* slots) {
  const int threads = static_cast<int>(blockDim.x);
  if constexpr (A == Along::positions) {
    return merge_items<Real>(threads / kWarp, [&](int i) { return slots[i]; });
  } else {
    const int first = group * members / V, columns = ((group + 1) * members - 1) / V - first + 1;
    return merge_items<Real>(threads / s.across * columns, [&](int i) {
      const int row = i / columns, column = first + i % columns;
      return slots[(row * s.across + column) * s.segments + group - column * V / members];
    });
  }
}

// ---------------------------------------------------------------- 2 and 3: of all blocks

// Of the groups of a bundle, from every block of the team, in the order of the blocks. `sums` are those of this block.
template <class T, class Real>
__device__ void combine(const Problem<T, Real>& k, const Sharing<Real>& s, int64_t bundle, const Room<T, Real>& room) {
  const int rank = static_cast<int>(blockIdx.x) % s.size;
  Moments<Real>* parts = s.parts + bundle * s.together * s.size;
  if (s.wait == Wait::grid && static_cast<int>(threadIdx.x) < s.together)
    parts[static_cast<int>(threadIdx.x) * s.size + rank] = room.sums[threadIdx.x];
  if (s.wait == Wait::cluster) {
    cluster_arrive();
    cluster_wait();
  } else if (s.wait == Wait::grid) {
    __syncthreads();
    if (threadIdx.x == 0) {
      arrive(s.arrived + bundle);
      wait_for(s.arrived + bundle, static_cast<unsigned>(s.size));
    }
    __syncthreads();
  }
  by_warps(s.together, [&](int group) {
    const Moments<Real> moments = merge_items<Real>(s.size, [&](int i) {
      if (s.wait == Wait::nobody) return room.sums[group];
      if (s.wait == Wait::cluster) return *in_block(room.sums + group, static_cast<unsigned>(i));
      return parts[group * s.size + i];
    });
    if (threadIdx.x % kWarp != 0) return;
    const Total<Real> total{moments.mean, inverse_deviation(moments, k.eps)};
    room.totals[group] = total;
    if (rank != 0) return;
    k.mean[bundle * s.together + group] = total.mean;
    k.rstd[bundle * s.together + group] = total.rstd;
  });
}

// ---------------------------------------------------------------- 4: modulate

// The block's vectors of a bundle: `count` from the `begin`-th on. The bundle begins with channel `first` of sample
// `b`.
struct Piece {
  int64_t b, first;
  int begin, count;
};

template <int V, Along A, class T, class Real>
__device__ void modulate_held(const Problem<T, Real>& k, const Sharing<Real>& s, const Piece& piece,
                              const Room<T, Real>& room) {
  constexpr int kAtOnce = kInFlight / 2;  // each asks for two or three vectors
  const int members = static_cast<int>(k.members), column = A == Along::positions ? 0 : threadIdx.x % s.across;
  Total<Real> totals[V];
  RAGSR_UNROLL
  for (int i = 0; i < V; ++i) totals[i] = room.totals[A == Along::positions ? 0 : (column * V + i) / members];
  const auto of = [&](int i) { return totals[A == Along::positions ? 0 : i]; };
  const auto* held = reinterpret_cast<const Pack<T, V>*>(room.held);
  Maps<V, T> maps[kAtOnce];
  int channel[kAtOnce], position[kAtOnce];
  over_vectors<V, A, kAtOnce>(
      piece.begin, piece.count, s.together * members, static_cast<int>(k.positions),
      [&](int j, int c, int p) {
        channel[j] = c;
        position[j] = p;
        maps[j] = read_maps<V, A>(k, piece.b, piece.first + c, p);
      },
      [&](int j, int i) {
        modulate<V, A>(k, piece.b, piece.first + channel[j], position[j], held[i], maps[j],
                       [&](int e) { return of(e).mean; }, [&](int e) { return of(e).rstd; });
      });
}

template <int V, Along A, class T, class Real>
__device__ Streams<V, Real> read_and_keep(const Problem<T, Real>& k, const Sharing<Real>& s, const Piece& piece,
                                          T* memory) {
  auto* held = reinterpret_cast<Pack<T, V>*>(memory);
  Streams<V, Real> streams;
  Pack<T, V> z[kInFlight];
  over_vectors<V, A, kInFlight>(
      piece.begin, piece.count, s.together * static_cast<int>(k.members), static_cast<int>(k.positions),
      [&](int j, int c, int p) { z[j] = read_joined<V, A, true>(k, piece.b, piece.first + c, p); },
      [&](int j, int i) {
        held[i] = z[j];
        streams.add(z[j]);
      });
  return streams;
}

template <int V, Along A, class T, class Real>
__global__ void __launch_bounds__(kMostThreads, 1) held_kernel(const Problem<T, Real> k, const Sharing<Real> s) {
  const Room<T, Real> room(dynamic_shared(), s.share * V, s.together);
  const int members = static_cast<int>(k.members), rank = static_cast<int>(blockIdx.x) % s.size;
  const int vectors = s.together * members * static_cast<int>(k.positions) / V;
  Piece piece{0, 0, rank * s.share, 0};
  piece.count = max(0, min(s.share, vectors - piece.begin));
  // teams share the bundles out; after a launch that is not cooperative each has one
  for (int64_t bundle = blockIdx.x / s.size; bundle < s.bundles; bundle += gridDim.x / s.size) {
    divide(bundle * s.together, k.groups, piece.b, piece.first);
    piece.first *= members;
    leave<V, A>(read_and_keep<V, A>(k, s, piece, room.held), s, members, room.slots);
    __syncthreads();
    by_warps(s.together, [&](int group) {
      const Moments<Real> moments = left_of<V, A>(group, s, members, room.slots);
      if (threadIdx.x % kWarp == 0) room.sums[group] = moments;
    });
    __syncthreads();
    combine(k, s, bundle, room);
    if (s.wait == Wait::cluster) cluster_arrive();  // has read what the others have in shared memory
    __syncthreads();
    modulate_held<V, A>(k, s, piece, room);
    if (s.wait == Wait::cluster) cluster_wait();  // all have
  }
}

}  // namespace ragsr::gpu
