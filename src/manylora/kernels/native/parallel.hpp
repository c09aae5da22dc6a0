// Work shared among the threads of OpenMP. Included by kernels.inl only.
//
// The package is loaded after torch, so on Linux this is torch's own OpenMP and its own threads: a second runtime would
// spin against the first (docs/decisions/0004).
#pragma once

#include <atomic>
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

// Calls work(own, i, next), where `next` is what the same thread will do after i; no task if it is `count` or more. `own` is
// what begin() returned, which each thread calls before its first task. Towards the end nobody takes a task before it can
// begin it, or others would have none.
template <class Begin, class Work>
static inline void parallel_for_with_next(int64_t count, int threads, const Begin& begin, const Work& work) {
  if (threads <= 1 || count <= 1) {
    auto own = begin();
    for (int64_t i = 0; i < count; i++) work(own, i, i + 1);
    return;
  }
  std::atomic<int64_t> untaken{0};
#pragma omp parallel num_threads(threads)
  if (int64_t i = untaken++; i < count) {
    auto own = begin();
    while (i < count) {
      const bool takes_next = untaken + threads <= count;
      const int64_t next = takes_next ? untaken++ : count;
      work(own, i, next);
      i = takes_next ? next : untaken++;
    }
  }
}

template <class Work>
static inline void parallel_for_with_next(int64_t count, int threads, const Work& work) {
  parallel_for_with_next(
      count, threads, [] { return 0; }, [&](int, int64_t i, int64_t next) { work(i, next); });
}

}  // namespace manylora::MANYLORA_ISA
