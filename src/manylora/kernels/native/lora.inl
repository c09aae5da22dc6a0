// Shrink and expand over segments, straight from scattered pages. Included by kernels.inl only.
//
// The order in which the products of one row are summed depends on its width and rank alone: neither on the other rows
// of the batch nor on the threads. So a request's bits do not depend on who is served beside it.
#pragma once

#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

constexpr int kRankBlock = 16;   // rank rows of a task: with their rows of x they stay in the first cache
constexpr int kEntryBlock = 64;  // entries of a task: a long prompt is shared among threads

template <class T>
static inline const T* rank_row(const RankRows& table, int64_t index) {
  return reinterpret_cast<const T*>(table.pages + table.offset[index]);
}

// h[e][r] = x[e] . a[r] for E rows and R rank rows.
template <class T, int E, int R>
static void dot_products(const float* const* x, const T* const* a, int64_t width, float* h, int64_t h_stride) {
  Vec total[E][R] = {};
  const auto accumulate = [&](const auto& load_at) {
    Vec rank_rows[R];
    MANYLORA_UNROLL for (int r = 0; r < R; r++) rank_rows[r] = load_at(a[r]);
    MANYLORA_UNROLL for (int e = 0; e < E; e++) {
      const Vec row = load_at(x[e]);
      MANYLORA_UNROLL for (int r = 0; r < R; r++) total[e][r] += row * rank_rows[r];
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) accumulate([i](const auto* from) { return load(from + i); });
  if (i < width) accumulate([i, width](const auto* from) { return load_part(from + i, width - i); });
  MANYLORA_UNROLL for (int e = 0; e < E; e++) {
    if constexpr (R % 4 == 0)
      MANYLORA_UNROLL for (int r = 0; r < R; r += 4) sum_four(total[e] + r, h + e * h_stride + r);
    else
      MANYLORA_UNROLL for (int r = 0; r < R; r++) h[e * h_stride + r] = sum(total[e][r]);
  }
}

template <class T, int E>
static void shrink_rows(const float* const* x, const T* const* a, int rank, int64_t width, float* h, int64_t h_stride) {
  constexpr int kMany = E == 1 ? 8 : 4;  // as many sums at a time as the processor can keep under way
  int r = 0;
  for (; r + kMany <= rank; r += kMany) dot_products<T, E, kMany>(x, a + r, width, h + r, h_stride);
  for (; r + 2 <= rank; r += 2) dot_products<T, E, 2>(x, a + r, width, h + r, h_stride);
  for (; r < rank; r++) dot_products<T, E, 1>(x, a + r, width, h + r, h_stride);
}

template <class T>
static void shrink_block(Rows x, int64_t width, const RankRows& table, int64_t first_rank_row, int rank,
                         const int32_t* rows, int num_entries, float* h, int64_t h_stride) {
  const T* a[kRankBlock];
  for (int r = 0; r < rank; r++) a[r] = rank_row<T>(table, first_rank_row + r);
  int e = 0;
  for (; e + 4 <= num_entries; e += 4) {
    const float* four[4];
    for (int i = 0; i < 4; i++) four[i] = x.data + rows[e + i] * x.stride;
    shrink_rows<T, 4>(four, a, rank, width, h + e * h_stride, h_stride);
  }
  for (; e < num_entries; e++) {
    const float* one = x.data + rows[e] * x.stride;
    shrink_rows<T, 1>(&one, a, rank, width, h + e * h_stride, h_stride);
  }
}

struct ShrinkTask {
  int64_t segment;
  float* h;  // of the segment
  int32_t first_entry, first_rank_row;
};

static void shrink(Rows x, int64_t width, RankRows a, Segments segments, float* h, int threads) {
  static thread_local std::vector<ShrinkTask> tasks;
  tasks.clear();
  for (int64_t s = 0; s < segments.count; s++) {
    const int32_t first = segments.row_start[s], last = segments.row_start[s + 1];
    for (int32_t e = first; e < last; e += kEntryBlock)
      for (int32_t r = a.begin[s]; r < a.end[s]; r += kRankBlock) tasks.push_back({s, h, e, r});
    h += static_cast<int64_t>(last - first) * (a.end[s] - a.begin[s]);
  }

  const ShrinkTask* task_list = tasks.data();
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [=](int64_t i) {
    const auto [s, segment_h, entry, rank_row] = task_list[i];
    const int64_t rank = a.end[s] - a.begin[s];
    const int num_ranks = a.end[s] - rank_row < kRankBlock ? a.end[s] - rank_row : kRankBlock;
    const int left = segments.row_start[s + 1] - entry;
    const int num_entries = left < kEntryBlock ? left : kEntryBlock;
    float* to = segment_h + (entry - segments.row_start[s]) * rank + (rank_row - a.begin[s]);
    const int32_t* rows = segments.rows + entry;
    switch (static_cast<DType>(segments.row_dtype[s])) {
      case DType::kFloat32: return shrink_block<float>(x, width, a, rank_row, num_ranks, rows, num_entries, to, rank);
      case DType::kBFloat16:
        return shrink_block<BFloat16>(x, width, a, rank_row, num_ranks, rows, num_entries, to, rank);
      case DType::kHalf: return shrink_block<Half>(x, width, a, rank_row, num_ranks, rows, num_entries, to, rank);
    }
  });
}

// y[e] += sum over r of gain[e][r] * b[r] for E rows, from column `from` on. C vectors of columns at a time.
template <class T, int E, int C>
static int64_t add_products(float* const* y, const float* gain, int64_t rank, const T* const* b, int64_t from,
                            int64_t end) {
  for (; from + C * kLanes <= end; from += C * kLanes) {
    Vec total[E][C] = {};
    for (int64_t r = 0; r < rank; r++) {
      Vec columns[C];
      MANYLORA_UNROLL for (int c = 0; c < C; c++) columns[c] = load(b[r] + from + c * kLanes);
      // The next columns of a rank row lie in other cache lines than the processor expects: it sees a jump to row r + 1.
      for (int c = 0; c < C * kLanes; c += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(b[r] + from + C * kLanes + c);
      MANYLORA_UNROLL for (int e = 0; e < E; e++) {
        const Vec factor = broadcast(gain[e * rank + r]);
        MANYLORA_UNROLL for (int c = 0; c < C; c++) total[e][c] += factor * columns[c];
      }
    }
    MANYLORA_UNROLL for (int e = 0; e < E; e++)
      MANYLORA_UNROLL for (int c = 0; c < C; c++) {
        float* to = y[e] + from + c * kLanes;
        store(to, load(to) + total[e][c]);
      }
  }
  return from;
}

template <class T, int E>
static void expand_rows(float* const* y, const float* gain, int64_t rank, const T* const* b, int64_t from,
                        int64_t end) {
  if constexpr (E == 1) from = add_products<T, E, 8>(y, gain, rank, b, from, end);
  from = add_products<T, E, 4>(y, gain, rank, b, from, end);
  from = add_products<T, E, 2>(y, gain, rank, b, from, end);
  from = add_products<T, E, 1>(y, gain, rank, b, from, end);
  if (from == end) return;
  MANYLORA_UNROLL for (int e = 0; e < E; e++) {
    Vec total = {};
    for (int64_t r = 0; r < rank; r++) total += broadcast(gain[e * rank + r]) * load_part(b[r] + from, end - from);
    store_part(y[e] + from, load_part(y[e] + from, end - from) + total, end - from);
  }
}

// All entries of segment s, columns from..end.
template <class T>
static void expand_segment(Rows y, const RankRows& table, const Segments& segments, int64_t s, const Hidden& hidden,
                           const float* h, float scaling, int64_t from, int64_t end) {
  static thread_local std::vector<const T*> b;
  static thread_local std::vector<float> gain;
  const int64_t rank = table.end[s] - table.begin[s];
  b.resize(rank);
  gain.resize(4 * rank);
  for (int64_t r = 0; r < rank; r++) b[r] = rank_row<T>(table, table.begin[s] + r);

  const int32_t first = segments.row_start[s], last = segments.row_start[s + 1];
  for (int32_t entry = first; entry < last;) {
    // Four rows share each rank row that is read; unless they are the same row, which must be added to in turn.
    const int32_t* rows = segments.rows + entry;
    const bool four = entry + 4 <= last && rows[0] != rows[1] && rows[0] != rows[2] && rows[0] != rows[3] &&
                      rows[1] != rows[2] && rows[1] != rows[3] && rows[2] != rows[3];
    const int count = four ? 4 : 1;
    float* to[4];
    for (int e = 0; e < count; e++) {
      to[e] = y.data + rows[e] * y.stride;
      const float* values = h + hidden.begin[s] + (entry + e - first) * static_cast<int64_t>(hidden.stride[s]);
      const float factor = segments.weight[entry + e] * scaling;
      for (int64_t r = 0; r < rank; r++) gain[e * rank + r] = values[r] * factor;
    }
    if (four)
      expand_rows<T, 4>(to, gain.data(), rank, b.data(), from, end);
    else
      expand_rows<T, 1>(to, gain.data(), rank, b.data(), from, end);
    entry += count;
  }
}

static void expand(Rows y, int64_t width, RankRows b, Segments segments, Hidden hidden, const float* h,
                   const float* scaling, int threads) {
  // Threads own columns, because several segments may add to one row; their bounds fall on whole cache lines of bf16.
  constexpr int64_t kStep = 32;
  const int64_t steps = (width + kStep - 1) / kStep;
  const int64_t parts = threads < steps ? threads : steps;
  parallel_for(parts, threads, [=](int64_t part) {
    const int64_t from = steps * part / parts * kStep;
    const int64_t to = steps * (part + 1) / parts * kStep;
    const int64_t end = to < width ? to : width;
    for (int64_t s = 0; s < segments.count; s++) {
      if (b.begin[s] == b.end[s]) continue;
      switch (static_cast<DType>(segments.row_dtype[s])) {
        case DType::kFloat32:
          expand_segment<float>(y, b, segments, s, hidden, h, scaling[s], from, end);
          break;
        case DType::kBFloat16:
          expand_segment<BFloat16>(y, b, segments, s, hidden, h, scaling[s], from, end);
          break;
        case DType::kHalf:
          expand_segment<Half>(y, b, segments, s, hidden, h, scaling[s], from, end);
          break;
      }
    }
  });
}

}  // namespace manylora::MANYLORA_ISA
