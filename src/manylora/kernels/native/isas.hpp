// The instruction sets of the kernels, and which of them this processor runs.
#pragma once

#include <vector>

#include "types.hpp"

namespace manylora {

// Widest first.
inline std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets;
#if defined(MANYLORA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni")) sets.push_back(&kAvx512VnniKernels);
    sets.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back(&kAvx2Kernels);
#endif
  sets.push_back(&kPortableKernels);
  return sets;
}

}  // namespace manylora
