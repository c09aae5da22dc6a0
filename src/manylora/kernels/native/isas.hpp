// The instruction sets of the kernels, and which of them this processor runs.
#pragma once

#if defined(MANYLORA_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <vector>

#include "types.hpp"

namespace manylora {

#if defined(MANYLORA_AMX)
// Whether the processor multiplies tiles of bfloat16, and Linux lets this process have their registers.
inline bool may_use_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;                     // AVX512-BF16
  constexpr long kAskForPermission = 0x1023, kTileData = 18;                          // of arch_prctl
  return syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
}
#endif

// Widest first.
inline std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets;
#if defined(MANYLORA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni")) {
#if defined(MANYLORA_AMX)
      if (may_use_tiles()) sets.push_back(&kAmxKernels);
#endif
      sets.push_back(&kAvx512VnniKernels);
    }
    sets.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back(&kAvx2Kernels);
#endif
  sets.push_back(&kPortableKernels);
  return sets;
}

}  // namespace manylora
