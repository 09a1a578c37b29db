// What kernels are written with: CUDA's own words, or on the host those of tests/csrc/cuda_on_host.h, which runs the same
// source thread by thread where there is no GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace ragsr {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__
// The shared memory whose size is given at the launch.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char ragsr_dynamic_shared[];
  return ragsr_dynamic_shared;
}
#endif

// Threads that do something together: `rank` of `size`; `sync` lets all see what each has written.
struct WarpTeam {
  static constexpr int size = kWarp;
  int rank;
  __device__ WarpTeam() : rank(static_cast<int>(threadIdx.x) % kWarp) {}
  __device__ void sync() const { __syncwarp(); }
};

struct BlockTeam {
  int rank, size;
  __device__ BlockTeam() : rank(static_cast<int>(threadIdx.x)), size(static_cast<int>(blockDim.x)) {}
  __device__ void sync() const { __syncthreads(); }
};

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger_of(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace ragsr
