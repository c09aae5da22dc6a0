// Shrink and expand over segments, straight from scattered pages. Included by kernels.inl only.
//
// The order in which the products of one row are summed depends on its width and rank alone: neither on the other rows
// of the batch nor on the threads. So a request's bits do not depend on who is served beside it.
//
// A step of many adapters is as long as its rank rows take to come from memory: each is read once, and what is read next
// is fetched while the rows before it are multiplied.
#pragma once

#include <type_traits>
#include <vector>

#include "ahead.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

constexpr int kRankBlock = 16;   // rank rows that are multiplied together: with a row of x they stay in the first cache
constexpr int kEntryBlock = 32;  // entries of a task: a long prompt is shared among threads
constexpr int kTogether = 4;     // entries that share a pass over the rank rows
constexpr int kAllRankRows = 1 << 30;

template <class T>
constexpr bool kHasScale = std::is_same_v<T, int8_t>;

// The values of a rank row.
template <class T>
static inline const T* rank_row(const RankRows& table, int64_t index) {
  return reinterpret_cast<const T*>(table.pages + table.offset[index] + (kHasScale<T> ? sizeof(float) : 0));
}

// What the values of a rank row are to be multiplied by; it stands before them.
static inline float scale_of(const int8_t* row) {
  float scale;
  std::memcpy(&scale, row - sizeof scale, sizeof scale);
  return scale;
}

// Columns from..end of rank rows first..last, as far as they follow one another in memory; nearly always all of them do.
static Ahead rows_ahead(const RankRows& table, int64_t first, int64_t last, int64_t width, DType dtype, int64_t from,
                        int64_t end) {
  if (first == last) return {};
  const int64_t begin = table.offset[first], stride = row_bytes(dtype, width);
  int64_t count = 1;
  while (first + count < last && table.offset[first + count] == begin + count * stride) count++;
  const int64_t skipped = from == 0 ? 0 : row_bytes(dtype, from);
  return {table.pages + begin + skipped, row_bytes(dtype, end) - skipped, stride, count};
}

// Columns from..end of x, or y, for the next entries, if their rows follow one another.
static Ahead entries_ahead(Rows x, const int32_t* rows, int count, int64_t from, int64_t end) {
  if (count < kTogether || rows[kTogether - 1] != rows[0] + kTogether - 1) return {};
  constexpr int64_t kSize = sizeof(float);
  return {reinterpret_cast<const uint8_t*>(x.data + rows[0] * x.stride + from), (end - from) * kSize, x.stride * kSize,
          kTogether};
}

// Calls work with a null pointer to the type that the rank rows of segment s are stored in.
template <class Work>
static inline void with_dtype(const Segments& segments, int64_t s, const Work& work) {
  switch (static_cast<DType>(segments.row_dtype[s])) {
    case DType::kFloat32: return work(static_cast<const float*>(nullptr));
    case DType::kBFloat16: return work(static_cast<const BFloat16*>(nullptr));
    case DType::kHalf: return work(static_cast<const Half*>(nullptr));
    case DType::kInt8: return work(static_cast<const int8_t*>(nullptr));
  }
}

// Calls work with how many entries share a pass over the rank rows: up to kTogether, a constant.
template <class Work>
static inline void with_count(int count, const Work& work) {
  switch (count) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    default: return work(std::integral_constant<int, kTogether>());
  }
}

// ---- shrink

// h[e][r] = x[e] . a[r] for E rows, arranged for T and padded with zeros to whole pairs, and R rank rows.
template <class T, int E, int R>
static void dot_products(const float* const* x, const T* const* a, int64_t width, float* h, int64_t h_stride,
                         Ahead& ahead) {
  Vec total[E][R] = {};
  const auto accumulate = [&](int64_t i, const auto& load_at) {
    Pair rows[E];
    MANYLORA_UNROLL for (int e = 0; e < E; e++) rows[e] = load_pair(x[e] + i);
    MANYLORA_UNROLL for (int r = 0; r < R; r++) {
      const Pair rank_row = load_at(a[r] + i);
      MANYLORA_UNROLL for (int e = 0; e < E; e++) {
        total[e][r] += rows[e].first * rank_row.first;
        total[e][r] += rows[e].second * rank_row.second;
      }
    }
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    ahead.step();
    accumulate(i, [](const T* from) { return load_pair(from); });
  }
  if (i < width) accumulate(i, [left = width - i](const T* from) { return load_pair_part(from, left); });
  MANYLORA_UNROLL for (int e = 0; e < E; e++) {
    if constexpr (R % 4 == 0)
      MANYLORA_UNROLL for (int r = 0; r < R; r += 4) sum_four(total[e] + r, h + e * h_stride + r);
    else
      MANYLORA_UNROLL for (int r = 0; r < R; r++) h[e * h_stride + r] = sum(total[e][r]);
    if constexpr (kHasScale<T>)
      MANYLORA_UNROLL for (int r = 0; r < R; r++) h[e * h_stride + r] *= scale_of(a[r]);
  }
}

template <class T, int E>
static void shrink_rows(const float* const* x, const T* const* a, int rank, int64_t width, float* h, int64_t h_stride,
                        Ahead& ahead) {
  // As many sums at a time as the processor can keep under way, and has registers for.
  constexpr int kMany = E == 1 || (E == 2 && kLanes == 16) ? 8 : 4;
  int r = 0;
  for (; r + kMany <= rank; r += kMany) dot_products<T, E, kMany>(x, a + r, width, h + r, h_stride, ahead);
  for (; r + 2 <= rank; r += 2) dot_products<T, E, 2>(x, a + r, width, h + r, h_stride, ahead);
  for (; r < rank; r++) dot_products<T, E, 1>(x, a + r, width, h + r, h_stride, ahead);
}

// Some rows of x, arranged for T one after another in memory of this thread.
template <class T>
static const float* arranged_rows(Rows x, int64_t width, int64_t padded, const int32_t* rows, int count) {
  static thread_local std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(count * padded)) memory.resize(count * padded);
  for (int e = 0; e < count; e++) {
    const float* from = x.data + rows[e] * x.stride;
    float* to = memory.data() + e * padded;
    for (int64_t i = 0; i < width; i += 2 * kLanes) {
      const bool whole = i + 2 * kLanes <= width;
      const Pair pair = arranged<T>(whole ? load_pair(from + i) : load_pair_part(from + i, width - i));
      store(to + i, pair.first);
      store(to + i + kLanes, pair.second);
    }
  }
  return memory.data();
}

// h[e] = x[e] . rank rows first..last, for some entries of a segment. A few entries at a time, whose rows of x stay in the
// first cache from one block of rank rows to the next.
template <class T>
static void shrink_entries(Rows x, int64_t width, const RankRows& table, int64_t first, int64_t last,
                           const int32_t* rows, int count, float* h, int64_t h_stride, DType dtype, Ahead then) {
  const int64_t padded = (width + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  for (int e = 0; e < count; e += kTogether) {
    const int left = count - e < kTogether ? count - e : kTogether;
    const float* const first_row = arranged_rows<T>(x, width, padded, rows + e, left);
    const float* some[kTogether];
    for (int i = 0; i < left; i++) some[i] = first_row + i * padded;
    for (int64_t begin = first; begin < last; begin += kRankBlock) {
      const int rank = static_cast<int>(last - begin < kRankBlock ? last - begin : kRankBlock);
      const T* a[kRankBlock];
      for (int r = 0; r < rank; r++) a[r] = rank_row<T>(table, begin + r);
      const int64_t after = begin + rank, end = after + kRankBlock < last ? after + kRankBlock : last;
      Ahead ahead;
      if (e == 0) ahead = after < last ? rows_ahead(table, after, end, width, dtype, 0, width) : then;
      else if (begin == first) ahead = entries_ahead(x, rows + e + left, count - e - left, 0, width);
      ahead.spread_over((left <= 2 ? (rank + 7) / 8 : (rank + 3) / 4) * (width / (2 * kLanes)));
      with_count(left, [&](auto together) {
        shrink_rows<T, together.value>(some, a, rank, width, h + e * h_stride + (begin - first), h_stride, ahead);
      });
    }
  }
}

// ---- expand

// y[e] += sum over r of gain[e][r] * b[r] for E rows, from column `from` on. C pairs of vectors of columns at a time.
template <class T, int E, int C>
static int64_t add_products(float* const* y, const float* gain, int64_t rank, const T* const* b, int64_t from,
                            int64_t end, Ahead& ahead) {
  for (; from + C * 2 * kLanes <= end; from += C * 2 * kLanes) {
    Pair total[E][C] = {};
    for (int64_t r = 0; r < rank; r++) {
      ahead.step();
      Vec factor[E];
      MANYLORA_UNROLL for (int e = 0; e < E; e++) factor[e] = broadcast(gain[e * rank + r]);
      MANYLORA_UNROLL for (int c = 0; c < C; c++) {
        const Pair columns = load_pair(b[r] + from + c * 2 * kLanes);
        MANYLORA_UNROLL for (int e = 0; e < E; e++) {
          total[e][c].first += factor[e] * columns.first;
          total[e][c].second += factor[e] * columns.second;
        }
      }
    }
    MANYLORA_UNROLL for (int e = 0; e < E; e++)
      MANYLORA_UNROLL for (int c = 0; c < C; c++) {
        float* to = y[e] + from + c * 2 * kLanes;
        const Pair sums = in_order<T>(total[e][c]);
        store(to, load(to) + sums.first);
        store(to + kLanes, load(to + kLanes) + sums.second);
      }
  }
  return from;
}

template <class T, int E>
static void expand_rows(float* const* y, const float* gain, int64_t rank, const T* const* b, int64_t from, int64_t end,
                        Ahead& ahead) {
  if constexpr (E <= 2) from = add_products<T, E, 4>(y, gain, rank, b, from, end, ahead);
  from = add_products<T, E, 2>(y, gain, rank, b, from, end, ahead);
  from = add_products<T, E, 1>(y, gain, rank, b, from, end, ahead);
  if (from == end) return;
  MANYLORA_UNROLL for (int e = 0; e < E; e++) {
    Pair total = {};
    for (int64_t r = 0; r < rank; r++) {
      const Vec factor = broadcast(gain[e * rank + r]);
      const Pair columns = load_pair_part(b[r] + from, end - from);
      total.first += factor * columns.first;
      total.second += factor * columns.second;
    }
    const Pair sums = in_order<T>(total), before = load_pair_part(y[e] + from, end - from);
    float after[2 * kLanes];
    store(after, before.first + sums.first);
    store(after + kLanes, before.second + sums.second);
    std::memcpy(y[e] + from, after, (end - from) * sizeof(float));
  }
}

// y[e] += weight * scaling * h[e] . rank rows first..last, columns from..end, for some entries of a segment.
template <class T>
static void expand_entries(Rows y, const RankRows& table, int64_t first, int64_t last, const int32_t* rows,
                           const float* weight, int count, float scaling, const float* h, int64_t h_stride,
                           int64_t from, int64_t end, Ahead ahead) {
  static thread_local std::vector<const T*> b;
  static thread_local std::vector<float> gain;
  const int64_t rank = last - first;
  b.resize(rank);
  gain.resize(kTogether * rank);
  for (int64_t r = 0; r < rank; r++) b[r] = rank_row<T>(table, first + r);
  for (int entry = 0; entry < count;) {
    // Some rows share each rank row that is read; unless one is there twice, which must be added to in turn.
    const int32_t* row = rows + entry;
    int together = count - entry < kTogether ? count - entry : kTogether;
    for (int e = 1; e < together; e++)
      for (int other = 0; other < e; other++)
        if (row[e] == row[other]) together = 1;
    float* to[kTogether];
    for (int e = 0; e < together; e++) {
      to[e] = y.data + row[e] * y.stride;
      const float* values = h + (entry + e) * h_stride;
      const float factor = weight[entry + e] * scaling;
      for (int64_t r = 0; r < rank; r++) {
        gain[e * rank + r] = values[r] * factor;
        if constexpr (kHasScale<T>) gain[e * rank + r] *= scale_of(b[r]);
      }
    }
    // What another thread has written of y comes as slowly as from memory.
    if (entry > 0) ahead = entries_ahead(y, row + together, count - entry - together, from, end);
    ahead.spread_over(rank * ((end - from) / ((together <= 2 ? 8 : 4) * kLanes) + 1));
    with_count(together, [&](auto rows_at_once) {
      expand_rows<T, rows_at_once.value>(to, gain.data(), rank, b.data(), from, end, ahead);
    });
    entry += together;
  }
}

// ---- over all segments

// Up to kEntryBlock entries of a segment, with all its rank rows or a block of them.
struct LoraTask {
  int64_t segment;
  float* h;  // of its first entry, where h is kept for all segments
  int32_t entry, num_entries, rank_row;
};

static const std::vector<LoraTask>& lora_tasks(const RankRows& a, const Segments& segments, float* h, int rank_block) {
  static thread_local std::vector<LoraTask> tasks;
  tasks.clear();
  for (int64_t s = 0; s < segments.count; s++) {
    const int32_t first = segments.row_start[s], last = segments.row_start[s + 1], rank = a.end[s] - a.begin[s];
    for (int32_t e = first; e < last; e += kEntryBlock) {
      const int32_t count = last - e < kEntryBlock ? last - e : kEntryBlock;
      for (int32_t r = 0; r < rank; r += rank_block)
        tasks.push_back({s, h ? h + static_cast<int64_t>(e - first) * rank : nullptr, e, count, a.begin[s] + r});
    }
    if (h) h += static_cast<int64_t>(last - first) * rank;
  }
  return tasks;
}

// Where each handful of tasks begins, and the end: about as many entries each, so that threads need not fetch every short
// task from one counter, which takes them as long as a row.
static const std::vector<int64_t>& handfuls(const std::vector<LoraTask>& tasks, int threads) {
  static thread_local std::vector<int64_t> start;
  int64_t num_entries = 0, taken = 0;
  for (const LoraTask& task : tasks) num_entries += task.num_entries;
  start.assign(1, 0);
  for (size_t i = 0; i < tasks.size(); i++) {
    taken += tasks[i].num_entries;
    if (i + 1 < tasks.size() && taken + tasks[i + 1].num_entries <= num_entries / (8 * threads)) continue;
    start.push_back(static_cast<int64_t>(i) + 1);
    taken = 0;
  }
  return start;
}

static void shrink(Rows x, int64_t width, RankRows a, Segments segments, float* h, int threads) {
  const std::vector<LoraTask>& list = lora_tasks(a, segments, h, kRankBlock);
  const LoraTask* tasks = list.data();
  const int64_t count = static_cast<int64_t>(list.size());
  const auto end_of = [a](const LoraTask& task) {
    const int32_t end = a.end[task.segment];
    return task.rank_row + kRankBlock < end ? task.rank_row + kRankBlock : end;
  };
  parallel_for_with_next(count, threads, [=](int64_t i, int64_t next) {
    const LoraTask& task = tasks[i];
    const auto dtype_of = [&](const LoraTask& of) { return static_cast<DType>(segments.row_dtype[of.segment]); };
    Ahead then;
    if (next < count) {
      const LoraTask& other = tasks[next];
      then = rows_ahead(a, other.rank_row, end_of(other), width, dtype_of(other), 0, width);
    }
    const int64_t rank = a.end[task.segment] - a.begin[task.segment];
    with_dtype(segments, task.segment, [&](auto* type) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      shrink_entries<T>(x, width, a, task.rank_row, end_of(task), segments.rows + task.entry, task.num_entries,
                        task.h + (task.rank_row - a.begin[task.segment]), rank, dtype_of(task), then);
    });
  });
}

// The columns of a site that one of several threads owns; bounds fall on whole cache lines of two-byte floats that begin at one.
struct Columns {
  int64_t from, end;
};

static Columns columns_of(int64_t width, int64_t part, int64_t parts) {
  constexpr int64_t kStep = 32;
  const int64_t steps = (width + kStep - 1) / kStep, end = steps * (part + 1) / parts * kStep;
  return {steps * part / parts * kStep, end < width ? end : width};
}

// One site, threads own columns, because several segments may add to one row.
static void expand(Rows y, int64_t width, RankRows b, Segments segments, Hidden hidden, const float* h,
                   const float* scaling, int threads) {
  parallel_for(threads, threads, [=](int64_t part) {
    const Columns own = columns_of(width, part, threads);
    if (own.from >= own.end) return;
    for (int64_t s = 0; s < segments.count; s++) {
      if (b.begin[s] == b.end[s]) continue;
      Ahead then;
      if (const int64_t other = s + 1; other < segments.count)
        then = rows_ahead(b, b.begin[other], b.end[other], width, static_cast<DType>(segments.row_dtype[other]),
                          own.from, own.end);
      const int32_t entry = segments.row_start[s];
      with_dtype(segments, s, [&](auto* type) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        expand_entries<T>(y, b, b.begin[s], b.end[s], segments.rows + entry, segments.weight + entry,
                          segments.row_start[s + 1] - entry, scaling[s], h + hidden.begin[s], hidden.stride[s],
                          own.from, own.end, then);
      });
    }
  });
}

// What a task of lora_by_segment reads first after site number i of its segment, or after its shrink for i = -1.
static Ahead site_ahead(const RankRows& table, const Site* sites, int64_t num_sites, int64_t s, DType dtype, int64_t i,
                        const Ahead& then) {
  for (i++; i < num_sites; i++) {
    const Site& site = sites[i];
    if (site.begin[s] < site.end[s])
      return rows_ahead(table, site.begin[s], site.end[s], site.width, dtype, 0, site.width);
  }
  return then;
}

// For rows with several entries, which two threads must not add to at a time, and for fewer tasks than threads.
static void lora_in_turn(Rows x, int64_t width, Rows y, RankRows a, const Site* sites, int64_t num_sites,
                         Segments segments, int threads) {
  static thread_local std::vector<float> h;
  static thread_local std::vector<int64_t> h_begin, site_begin;
  static thread_local std::vector<int32_t> h_stride;
  h_begin.resize(segments.count);
  site_begin.resize(segments.count);
  h_stride.resize(segments.count);
  int64_t num_hidden = 0;
  for (int64_t s = 0; s < segments.count; s++) {
    h_begin[s] = num_hidden;
    h_stride[s] = a.end[s] - a.begin[s];
    num_hidden += static_cast<int64_t>(segments.row_start[s + 1] - segments.row_start[s]) * h_stride[s];
  }
  h.resize(num_hidden);
  shrink(x, width, a, segments, h.data(), threads);
  for (int64_t i = 0; i < num_sites; i++) {
    const Site& site = sites[i];
    for (int64_t s = 0; s < segments.count; s++) site_begin[s] = h_begin[s] + site.h_column[s];
    expand({y.data + site.column, y.stride}, site.width, {a.pages, a.offset, site.begin, site.end}, segments,
           {site_begin.data(), h_stride.data()}, h.data(), site.scaling, threads);
  }
}

// The rank rows of a segment follow one another in memory, of all sites of a stack: a thread reads them front to back,
// and its h never leaves the cache.
static void lora_by_segment(Rows x, int64_t width, Rows y, RankRows a, const Site* sites, int64_t num_sites,
                            Segments segments, int threads) {
  const std::vector<LoraTask>& list = lora_tasks(a, segments, nullptr, kAllRankRows);
  const std::vector<int64_t>& handful = handfuls(list, threads);
  const LoraTask* tasks = list.data();
  const int64_t* start = handful.data();
  const int64_t count = static_cast<int64_t>(handful.size()) - 1;
  const auto work = [=](const LoraTask& task, const LoraTask* next) {
    static thread_local std::vector<float> h;
    const int64_t s = task.segment, rank = a.end[s] - a.begin[s];
    const DType dtype = static_cast<DType>(segments.row_dtype[s]);
    Ahead next_task;
    if (next && next->segment != s) {
      const int64_t other = next->segment, begin = a.begin[other];
      const int64_t end = begin + kRankBlock < a.end[other] ? begin + kRankBlock : a.end[other];
      next_task = rows_ahead(a, begin, end, width, static_cast<DType>(segments.row_dtype[other]), 0, width);
    }
    const int32_t* rows = segments.rows + task.entry;
    if (h.size() < static_cast<size_t>(task.num_entries * rank)) h.resize(task.num_entries * rank);
    with_dtype(segments, s, [&](auto* type) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      shrink_entries<T>(x, width, a, a.begin[s], a.end[s], rows, task.num_entries, h.data(), rank, dtype,
                        site_ahead(a, sites, num_sites, s, dtype, -1, next_task));
      for (int64_t i = 0; i < num_sites; i++) {
        const Site& site = sites[i];
        if (site.begin[s] == site.end[s]) continue;
        expand_entries<T>({y.data + site.column, y.stride}, a, site.begin[s], site.end[s], rows,
                          segments.weight + task.entry, task.num_entries, site.scaling[s], h.data() + site.h_column[s],
                          rank, 0, site.width, site_ahead(a, sites, num_sites, s, dtype, i, next_task));
      }
    });
  };
  parallel_for_with_next(count, threads, [=](int64_t number, int64_t next) {
    for (int64_t i = start[number], end = start[number + 1]; i < end; i++)
      work(tasks[i], i + 1 < end ? tasks + i + 1 : next < count ? tasks + start[next] : nullptr);
  });
}

static void lora(Rows x, int64_t width, Rows y, RankRows a, const Site* sites, int64_t num_sites, Segments segments,
                 bool each_row_once, int threads) {
  int64_t num_tasks = 0;
  for (int64_t s = 0; s < segments.count; s++) {
    const int32_t entries = segments.row_start[s + 1] - segments.row_start[s];
    if (a.begin[s] < a.end[s]) num_tasks += (entries + kEntryBlock - 1) / kEntryBlock;
  }
  const bool by_segment = each_row_once && num_tasks >= threads;
  (by_segment ? lora_by_segment : lora_in_turn)(x, width, y, a, sites, num_sites, segments, threads);
}

}  // namespace manylora::MANYLORA_ISA
