// The instruction sets that kernels are compiled for, and the choice among them at run time. Free of torch.
//
//     portable    what every processor of its kind has: vectors of 128 bits are SSE2 on x86-64 and NEON on arm64
//     neon        kernels written for arm64
//     avx2        with FMA, F16C and POPCNT, which every processor with AVX2 has
//     avx512      F, BW, VL and DQ; a kernel that needs more of it asks for that itself
//
// The best set that a family of kernels has for this machine is taken; RAGSR_CPU names a set above which none is.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define RAGSR_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__GNUC__)
#define RAGSR_NEON 1
#include <arm_neon.h>
#endif

namespace ragsr {

using InstructionSets = std::vector<std::string>;

inline bool contains(const InstructionSets& sets, const std::string& name) {
  return std::find(sets.begin(), sets.end(), name) != sets.end();
}

// Those of this machine, best last.
inline const InstructionSets& machine_sets() {
  static const InstructionSets found = [] {
    InstructionSets sets{"portable"};
#ifdef RAGSR_NEON
    sets.push_back("neon");
#endif
#ifdef RAGSR_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("popcnt"))
      sets.push_back("avx2");
    if (contains(sets, "avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      sets.push_back("avx512");
#endif
    return sets;
  }();
  return found;
}

// Those up to the one that RAGSR_CPU names. Throws std::runtime_error for one that this machine has not.
inline InstructionSets allowed_sets() {
  InstructionSets sets = machine_sets();
  const char* wanted = std::getenv("RAGSR_CPU");
  if (wanted == nullptr || *wanted == '\0') return sets;
  const auto last = std::find(sets.begin(), sets.end(), wanted);
  if (last != sets.end()) return {sets.begin(), last + 1};
  std::string names;
  for (const std::string& set : sets) names += (names.empty() ? "" : ", ") + set;
  throw std::runtime_error("RAGSR_CPU is '" + std::string(wanted) + "', but this machine has: " + names);
}

// The last of `kernels` whose `name` is that of an allowed set; the first one is portable.
template <class Kernel>
Kernel choose(const std::vector<Kernel>& kernels) {
  const InstructionSets allowed = allowed_sets();
  const Kernel* best = &kernels.front();
  for (const Kernel& kernel : kernels)
    if (contains(allowed, kernel.name)) best = &kernel;
  return *best;
}

}  // namespace ragsr
