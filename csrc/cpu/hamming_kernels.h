// The kernels of each instruction set, and which of them is used.
#pragma once

#include <cstdint>
#include <vector>

#include "hamming_targets.h"

namespace ragsr {

using ScanKernel = void (*)(const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n, int64_t width,
                            int64_t first, Nearest* nearest);
using CubeKernel = void (*)(uint32_t* table, int64_t cells, int64_t k, int pass, int64_t part, int64_t parts);

struct CpuKernel {
  const char* name;
  DistanceKernel distances;
  ScanKernel scan;
  CubeKernel cube_pass;
  int64_t cells;  // of a vector of the cube
};

// What this machine can run, best last.
inline std::vector<CpuKernel> available_kernels() {
  std::vector<CpuKernel> kernels{
      {"portable", distances_portable, portable::scan, portable::cube_pass, portable::kCells}};
#ifdef RAGSR_NEON
  kernels.push_back({"neon", distances_neon, portable::scan, portable::cube_pass, portable::kCells});
#endif
#ifdef RAGSR_X86
  if (contains(machine_sets(), "avx2"))
    kernels.push_back({"avx2", distances_avx2, avx2::scan, avx2::cube_pass, avx2::kCells});
  if (contains(machine_sets(), "avx512") && __builtin_cpu_supports("avx512vpopcntdq") &&
      __builtin_cpu_supports("avx512bitalg"))
    kernels.push_back({"avx512", distances_avx512, avx512::scan, avx512::cube_pass, avx512::kCells});
#endif
  return kernels;
}

inline CpuKernel choose_kernel() { return choose(available_kernels()); }

}  // namespace ragsr
