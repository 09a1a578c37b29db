// Blocks that work together. Whoever writes for the others writes, lets its own block meet (`__syncthreads`), then one
// thread arrives; whoever reads what others wrote waits first, then lets its own block meet.
//
//     counters    in global memory, 0 before the launch. Waiting is allowed only where all blocks are on the chip at
//                 once: after a cooperative launch, which the driver refuses if they do not fit.
//     clusters    of up to 8 blocks, sm_90 and later: a barrier in hardware, and each may read the shared memory of the
//                 others, until they have left. Blocks of a cluster are neighbours in the grid.
//
// On the host, tests/csrc/cuda_on_host.h has the same functions.
#pragma once

#include "device.h"

#ifdef __CUDACC__
namespace ragsr {

__device__ inline void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline void wait_for(const unsigned* counter, unsigned number) {
  unsigned arrived;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
  } while (arrived < number);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// All threads of a block; it counts as a meeting of the block, too.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where block `rank` of the cluster has what this block has at `own`, in shared memory.
template <class T>
__device__ const T* in_block(const T* own, unsigned rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<const T*>(there);
}
#else  // there are none: nobody launches them
__device__ inline void cluster_arrive() { __trap(); }
__device__ inline void cluster_wait() { __trap(); }
template <class T>
__device__ const T* in_block(const T* own, unsigned) {
  return own;
}
#endif

}  // namespace ragsr
#endif
