// The kernels of group_norm_sft_forward that cut a group up: statistics of parts, their merging, the result.
// csrc/cuda/sft_plan.h says when they run.
#pragma once

#include "device.h"
#include "sft.h"

namespace ragsr::gpu {

template <class Real>
__device__ Moments<Real> merge_warp(Moments<Real> moments) {
  constexpr unsigned all = 0xffffffffu;
  RAGSR_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    const Moments<Real> other{__shfl_down_sync(all, moments.count, distance),
                              __shfl_down_sync(all, moments.mean, distance),
                              __shfl_down_sync(all, moments.m2, distance)};
    moments = merge(moments, other);
  }
  return moments;  // of lane 0: the warp's
}

// The moments of all threads, for every thread.
template <class Real>
__device__ Moments<Real> merge_block(Moments<Real> moments) {
  __shared__ Moments<Real> warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  moments = merge_warp(moments);
  if (lane == 0) warps[warp] = moments;
  __syncthreads();
  if (warp == 0) {
    moments = merge_warp(lane < blockDim.x / 32 ? warps[lane] : Moments<Real>{});
    if (lane == 0) warps[0] = moments;
  }
  __syncthreads();
  return warps[0];
}

template <class Real>
__device__ Real inverse_deviation(const Moments<Real>& moments, Real eps) {
  return 1 / sqrt(moments.m2 / moments.count + eps);
}

// `means` and `m2s` are [B, C, S].
template <int V, Along A, class T, class Real>
__global__ void __launch_bounds__(kThreads, 2)
    statistics_kernel(const Problem<T, Real> k, const Parts parts, Real* means, Real* m2s) {
  int64_t block, split, b, c;
  divide(blockIdx.x, parts.splits, block, split);
  divide(block, parts.blocks, b, c);
  const int64_t start = split * parts.span, stop = min(start + parts.span, k.positions);
  if constexpr (A == Along::positions) {
    const Moments<Real> moments = merge_block(gather<V, A>(k, b, c, start, stop, threadIdx.x, kThreads).all());
    if (threadIdx.x == 0) {
      means[block * parts.splits + split] = moments.mean;
      m2s[block * parts.splits + split] = moments.m2;
    }
  } else {
    // rows of `across` threads, side by side over the channels; then a thread adds up the rows of its channels
    __shared__ Moments<Real> rows[kThreads * V];
    const int across = static_cast<int>(parts.across), column = threadIdx.x % across, row = threadIdx.x / across;
    const int height = kThreads / across, width = across * V;
    const int64_t begin = c * width, channel = begin + column * V;
    if (row < height) {
      Streams<V, Real> streams;
      if (channel < k.channels) streams = gather<V, A>(k, b, channel, start, stop, row, height);
  RAGSR_UNROLL
      for (int i = 0; i < V; ++i) {
        rows[row * width + column * V + i] = {streams.count, streams.mean[i], streams.m2[i]};
      }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < width && begin + j < k.channels; j += kThreads) {
      Moments<Real> sum = rows[j];
      for (int r = 1; r < height; ++r) sum = merge(sum, rows[r * width + j]);
      const int64_t at = (b * k.channels + begin + j) * parts.splits + split;
      means[at] = sum.mean;
      m2s[at] = sum.m2;
    }
  }
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const Problem<T, Real> k, const Parts parts, const Real* means, const Real* m2s) {
  const int64_t group = blockIdx.x, count = k.members * parts.splits;
  Moments<Real> moments{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    int64_t channel, split;
    divide(i, parts.splits, channel, split);
    const int64_t positions = min(parts.span, k.positions - split * parts.span);
    moments = merge(moments, {static_cast<Real>(positions), means[group * count + i], m2s[group * count + i]});
  }
  moments = merge_block(moments);
  if (threadIdx.x == 0) {
    k.mean[group] = moments.mean;
    k.rstd[group] = inverse_deviation(moments, k.eps);
  }
}

template <int V, Along A, class T, class Real>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(const Problem<T, Real> k) {
  const int64_t sample = k.channels * k.positions / V;
  const int64_t v = (int64_t{gridDim.x} - 1 - blockIdx.x) * kThreads + threadIdx.x;
  if (v >= k.batch * sample) return;
  int64_t b, rest, c, p, group, member;
  divide(v, sample, b, rest);
  place<V, A>(rest, k.channels, k.positions, c, p);
  const Pack<T, V> z = read_joined<V, A, true>(k, b, c, p);
  divide(c, k.members, group, member);
  group += b * k.groups;
  Real mean[V], rstd[V];
  RAGSR_UNROLL
  for (int i = 0; i < V; ++i) {
    mean[i] = k.mean[group];
    rstd[i] = k.rstd[group];
    if (A == Along::channels && ++member == k.members && i + 1 < V) {
      ++group;
      member = 0;
    }
  }
  const Maps<V, T> maps = read_maps<V, A>(k, b, c, p);
  modulate<V, A>(k, b, c, p, z, maps, [&](int i) { return mean[i]; }, [&](int i) { return rstd[i]; });
}

}  // namespace ragsr::gpu
