// The kernels of each instruction set, and the choice among them at run time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
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
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"))
    kernels.push_back({"avx2", distances_avx2, avx2::scan, avx2::cube_pass, avx2::kCells});
  if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    kernels.push_back({"avx512", distances_avx512, avx512::scan, avx512::cube_pass, avx512::kCells});
#endif
  return kernels;
}

// The best kernel of this machine, or the one RAGSR_CPU names. Throws std::runtime_error for one it has not.
inline CpuKernel choose_kernel() {
  const std::vector<CpuKernel> kernels = available_kernels();
  const char* wanted = std::getenv("RAGSR_CPU");
  if (wanted == nullptr || *wanted == '\0') return kernels.back();
  std::string names;
  for (const CpuKernel& kernel : kernels) {
    if (std::strcmp(kernel.name, wanted) == 0) return kernel;
    names += std::string(names.empty() ? "" : ", ") + kernel.name;
  }
  throw std::runtime_error("RAGSR_CPU is '" + std::string(wanted) + "', but this machine has: " + names);
}

}  // namespace ragsr
