// Work shared among the threads of OpenMP. Included by kernels.inl only.
//
// The package is loaded after torch, so on Linux this is torch's own OpenMP and its own threads: a second runtime would
// spin against the first (docs/decisions/0004).
#pragma once

#include <cstdint>

namespace manylora::MANYLORA_ISA {

// Calls work(i) for i in 0..count, in any order, `threads` at a time; tasks are handed out as threads become free.
template <class Work>
static inline void parallel_for(int64_t count, int threads, const Work& work) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; i++) work(i);
}

}  // namespace manylora::MANYLORA_ISA
