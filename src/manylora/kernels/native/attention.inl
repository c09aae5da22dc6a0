// Paged attention, and the writing of new keys and values. Included by kernels.inl only.
//
// A row's sums run over its tokens in order, whatever else is in the batch.
#pragma once

#include <vector>

#include "ahead.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

constexpr int kQueries = 4;       // queries that share each key and value that is read
constexpr int kTaskQueries = 32;  // queries of a task

// The keys, or the values, of one sequence, of neighbouring heads.
template <class T>
struct Tokens {
  const uint8_t* plane;
  const int32_t* pages;
  int64_t page_bytes, page_tokens, token_dim;
  int64_t first_element, num_elements;  // of a token: those of the heads
  bool in_cache;                        // they have just been read

  // Calls use(first, last, elements of the first, what is read next) for the tokens 0..end, those of a page together.
  // `after`: what is read after the last page.
  template <class Use>
  void each_page(int64_t end, const Ahead& after, const Use& use) const {
    for (int64_t first = 0; first < end; first += page_tokens) {
      const int64_t last = first + page_tokens < end ? first + page_tokens : end;
      use(first, last, address(first), last < end ? ahead(last, end) : after);
    }
  }

  const T* address(int64_t first_of_page) const {
    return reinterpret_cast<const T*>(plane + pages[first_of_page / page_tokens] * page_bytes);
  }

  // The page that begins with this token, of a sequence of `end` tokens.
  Ahead ahead(int64_t first_of_page, int64_t end) const {
    if (in_cache) return {};
    const int64_t tokens = end - first_of_page < page_tokens ? end - first_of_page : page_tokens;
    return {reinterpret_cast<const uint8_t*>(address(first_of_page) + first_element),
            num_elements * static_cast<int64_t>(sizeof(T)), token_dim * static_cast<int64_t>(sizeof(T)), tokens};
  }
};

// N queries (rows and heads) that read the same key head.
template <int N>
struct Queries {
  int64_t head_offset;  // of the key head within a token
  const float* q[N];
  float* out[N];
  int64_t visible[N];  // tokens that each may see, not falling
};

// scores[n][token] = scale * q[n] . key for the tokens first..last of a page.
template <class T, int N, int kCount>
static void score_tokens(const Queries<N>& queries, const T* key, int64_t token_dim, int64_t head_dim, float scale,
                         float* scores, int64_t stride) {
  Vec total[N][kCount] = {};
  const auto accumulate = [&](const auto& load_at) {
    Vec k[kCount];
    MANYLORA_UNROLL for (int i = 0; i < kCount; i++) k[i] = load_at(key + i * token_dim);
    MANYLORA_UNROLL for (int n = 0; n < N; n++) {
      const Vec q = load_at(queries.q[n]);
      MANYLORA_UNROLL for (int i = 0; i < kCount; i++) total[n][i] += q * k[i];
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) accumulate([d](const auto* from) { return load(from + d); });
  if (d < head_dim) accumulate([=](const auto* from) { return load_part(from + d, head_dim - d); });
  MANYLORA_UNROLL for (int n = 0; n < N; n++) {
    float* to = scores + n * stride;
    if constexpr (kCount == 4)
      sum_four(total[n], to);
    else
      to[0] = sum(total[n][0]);
    MANYLORA_UNROLL for (int i = 0; i < kCount; i++) to[i] *= scale;
  }
}

template <class T, int N>
static void score_page(const Queries<N>& queries, int64_t first, int64_t last, const T* keys, int64_t token_dim,
                       int64_t head_dim, float scale, float* scores, int64_t stride, Ahead& ahead) {
  const T* key = keys + queries.head_offset;
  for (; first + 4 <= last; first += 4, key += 4 * token_dim) {
    ahead.step();
    score_tokens<T, N, 4>(queries, key, token_dim, head_dim, scale, scores + first, stride);
  }
  if (first < last) ahead.step();
  for (; first < last; first++, key += token_dim)
    score_tokens<T, N, 1>(queries, key, token_dim, head_dim, scale, scores + first, stride);
}

// Replaces scores by e^(score - largest) and returns their sum. `scores` has room for whole vectors.
static float exponentiate(float* scores, int64_t count) {
  for (int64_t i = count; i % kLanes; i++) scores[i] = scores[0];
  Vec top = load(scores);
  for (int64_t i = kLanes; i < count; i += kLanes) top = larger(top, load(scores + i));
  const float highest = largest(top);
  Vec total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    store(scores + i, exponential(load(scores + i) - highest));
    if (i + kLanes > count)
      for (int64_t beyond = count; beyond < i + kLanes; beyond++) scores[beyond] = 0;
    total += load(scores + i);
  }
  return sum(total);
}

// out[n][columns] += sum over the tokens first..last of a page of weights[n][token] * value[columns]; C vectors of
// columns from d on, the last of which has `width` columns only.
template <class T, int N, int C, bool kPart>
static void weigh_columns(const Queries<N>& queries, int64_t first, int64_t last, const T* value, int64_t token_dim,
                          int64_t d, int64_t width, const float* weights, int64_t stride, Ahead& ahead) {
  const auto take = [&](const auto* from) { return kPart ? load_part(from, width) : load(from); };
  Vec total[N][C];
  MANYLORA_UNROLL for (int n = 0; n < N; n++)
    MANYLORA_UNROLL for (int c = 0; c < C; c++) total[n][c] = take(queries.out[n] + d + c * kLanes);
  value += d;
  const int64_t common = queries.visible[0] < last ? queries.visible[0] : last;  // tokens that all queries see
  for (int64_t token = first; token < common; token++, value += token_dim) {
    if (token % 4 == 0) ahead.step();
    Vec v[C];
    MANYLORA_UNROLL for (int c = 0; c < C; c++) v[c] = take(value + c * kLanes);
    MANYLORA_UNROLL for (int n = 0; n < N; n++) {
      const Vec weight = broadcast(weights[n * stride + token]);
      MANYLORA_UNROLL for (int c = 0; c < C; c++) total[n][c] += weight * v[c];
    }
  }
  for (int64_t token = first < common ? common : first; token < last; token++, value += token_dim)
    MANYLORA_UNROLL for (int n = 0; n < N; n++)
      if (token < queries.visible[n]) {
        const Vec weight = broadcast(weights[n * stride + token]);
        MANYLORA_UNROLL for (int c = 0; c < C; c++) total[n][c] += weight * take(value + c * kLanes);
      }
  MANYLORA_UNROLL for (int n = 0; n < N; n++)
    MANYLORA_UNROLL for (int c = 0; c < C; c++) {
      float* to = queries.out[n] + d + c * kLanes;
      kPart ? store_part(to, total[n][c], width) : store(to, total[n][c]);
    }
}

template <class T, int N>
static void weigh_page(const Queries<N>& queries, int64_t first, int64_t last, const T* values, int64_t token_dim,
                       int64_t head_dim, const float* weights, int64_t stride, Ahead& ahead) {
  const T* value = values + queries.head_offset;
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
    weigh_columns<T, N, 4, false>(queries, first, last, value, token_dim, d, 0, weights, stride, ahead);
  for (; d + kLanes <= head_dim; d += kLanes)
    weigh_columns<T, N, 1, false>(queries, first, last, value, token_dim, d, 0, weights, stride, ahead);
  if (d < head_dim)
    weigh_columns<T, N, 1, true>(queries, first, last, value, token_dim, d, head_dim - d, weights, stride, ahead);
}

// Several key heads, N queries of each: page after page, so that the keys and values of a token are read at once.
template <class T, int N>
static void attend_together(const std::vector<Queries<N>>& heads, const Tokens<T>& keys, const Tokens<T>& values,
                            int64_t head_dim, float scale, const Ahead& then) {
  static thread_local std::vector<float> scores, sums;
  const int64_t visible = heads[0].visible[N - 1];
  const int64_t stride = (visible / kLanes + 1) * kLanes, count = static_cast<int64_t>(heads.size());
  if (scores.size() < static_cast<size_t>(count * N * stride)) scores.resize(count * N * stride);
  sums.resize(count * N);
  const auto of = [&](int64_t head) { return scores.data() + head * N * stride; };

  // A page is gone through once for each head, four tokens at a time.
  const auto begin = [&](Ahead ahead, int64_t first, int64_t last) {
    ahead.spread_over(count * ((last - first + 3) / 4));
    return ahead;
  };
  keys.each_page(visible, values.ahead(0, visible), [&](int64_t first, int64_t last, const T* page, const Ahead& next) {
    Ahead ahead = begin(next, first, last);
    for (int64_t h = 0; h < count; h++)
      score_page<T, N>(heads[h], first, last, page, keys.token_dim, head_dim, scale, of(h), stride, ahead);
  });
  for (int64_t h = 0; h < count; h++)
    MANYLORA_UNROLL for (int n = 0; n < N; n++) {
      sums[h * N + n] = exponentiate(of(h) + n * stride, heads[h].visible[n]);
      std::memset(heads[h].out[n], 0, head_dim * sizeof(float));
    }
  values.each_page(visible, then, [&](int64_t first, int64_t last, const T* page, const Ahead& next) {
    Ahead ahead = begin(next, first, last);
    for (int64_t h = 0; h < count; h++)
      weigh_page<T, N>(heads[h], first, last, page, values.token_dim, head_dim, of(h), stride, ahead);
  });
  for (int64_t h = 0; h < count; h++)
    MANYLORA_UNROLL for (int n = 0; n < N; n++)
      for (int64_t d = 0; d < head_dim; d++) heads[h].out[n][d] /= sums[h * N + n];
}

struct AttendTask {
  int64_t sequence, first_head, last_head, first_query;  // query i of a head: row i / group, i % group of the head's
};

template <class T>
static Tokens<T> tokens_of(const uint8_t* keys_or_values, const AttendTask& task, const KvPlane& plane,
                           const Sequences& sequences, bool in_cache) {
  return {keys_or_values,
          sequences.block_table + task.sequence * sequences.table_width,
          plane.page_bytes,
          plane.page_tokens,
          plane.num_kv_heads * plane.head_dim,
          task.first_head * plane.head_dim,
          (task.last_head - task.first_head) * plane.head_dim,
          in_cache};
}

// Queries first..first + N of each key head of the task.
template <class T, int N>
static void attend_queries(const AttendTask& task, int64_t first, Rows q, Rows out, int64_t group,
                           const KvPlane& plane, const Sequences& sequences, float scale, const Ahead& then) {
  static thread_local std::vector<Queries<N>> heads;
  const int64_t first_row = sequences.query_start[task.sequence];
  const int64_t num_new = sequences.query_start[task.sequence + 1] - first_row;
  heads.resize(task.last_head - task.first_head);
  for (int64_t h = task.first_head; h < task.last_head; h++)
    MANYLORA_UNROLL for (int n = 0; n < N; n++) {
      const int64_t row = (first + n) / group;
      const int64_t column = (h * group + (first + n) % group) * plane.head_dim;
      Queries<N>& queries = heads[h - task.first_head];
      queries.head_offset = h * plane.head_dim;
      queries.q[n] = q.data + (first_row + row) * q.stride + column;
      queries.out[n] = out.data + (first_row + row) * out.stride + column;
      queries.visible[n] = sequences.context_len[task.sequence] - num_new + row + 1;
    }
  const bool in_cache = first != task.first_query;  // by the first queries of the task
  attend_together<T, N>(heads, tokens_of<T>(plane.keys, task, plane, sequences, in_cache),
                        tokens_of<T>(plane.values, task, plane, sequences, in_cache), plane.head_dim, scale, then);
}

template <class T>
static void attend_task(const AttendTask& task, Rows q, Rows out, int64_t group, const KvPlane& plane,
                        const Sequences& sequences, float scale, const AttendTask* next) {
  Ahead then;
  if (next) then = tokens_of<T>(plane.keys, *next, plane, sequences, false).ahead(0, sequences.context_len[next->sequence]);
  const int64_t all = (sequences.query_start[task.sequence + 1] - sequences.query_start[task.sequence]) * group;
  const int64_t last = task.first_query + kTaskQueries < all ? task.first_query + kTaskQueries : all;
  int64_t query = task.first_query;
  for (; query + kQueries <= last; query += kQueries)
    attend_queries<T, kQueries>(task, query, q, out, group, plane, sequences, scale,
                                query + kQueries < last ? Ahead{} : then);
  switch (last - query) {
    case 3: return attend_queries<T, 3>(task, query, q, out, group, plane, sequences, scale, then);
    case 2: return attend_queries<T, 2>(task, query, q, out, group, plane, sequences, scale, then);
    case 1: return attend_queries<T, 1>(task, query, q, out, group, plane, sequences, scale, then);
  }
}

static void attend(Rows q, Rows out, int64_t num_heads, KvPlane plane, Sequences sequences, float scale, int threads) {
  static thread_local std::vector<AttendTask> tasks;
  tasks.clear();
  const int64_t group = num_heads / plane.num_kv_heads;
  for (int64_t i = 0; i < sequences.count; i++) {
    const int64_t all = (sequences.query_start[i + 1] - sequences.query_start[i]) * group;
    // A decode is bound by memory: all heads of a token at once. A chunk is bound by arithmetic, and its keys stay in
    // cache: a head at a time. Few sequences are shared out by heads to give every thread something.
    const bool together = all <= kQueries && sequences.count >= 2 * threads;
    const int64_t heads = together ? plane.num_kv_heads : 1;
    // From the end of a chunk to its beginning: the last queries see most and take longest.
    for (int64_t first = (all - 1) / kTaskQueries * kTaskQueries; all > 0 && first >= 0; first -= kTaskQueries)
      for (int64_t head = 0; head < plane.num_kv_heads; head += heads)
        tasks.push_back({i, head, head + heads, first});
  }
  const AttendTask* task_list = tasks.data();
  const int64_t count = static_cast<int64_t>(tasks.size());
  parallel_for_with_next(count, threads, [=](int64_t i, int64_t number) {
    const AttendTask* next = number < count ? task_list + number : nullptr;
    switch (plane.dtype) {
      case DType::kFloat32: return attend_task<float>(task_list[i], q, out, group, plane, sequences, scale, next);
      case DType::kBFloat16: return attend_task<BFloat16>(task_list[i], q, out, group, plane, sequences, scale, next);
      case DType::kHalf: return attend_task<Half>(task_list[i], q, out, group, plane, sequences, scale, next);
      case DType::kInt8: return;  // KvLayout lets none through
    }
  });
}

static void store_token(const float* from, uint8_t* to, int64_t count, DType dtype) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  uint16_t* shorts = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; i++) shorts[i] = to_bfloat16(from[i]);
}

static void write_kv(Rows k, Rows v, int64_t num_rows, KvPlane plane, const int64_t* slot_page,
                     const int64_t* slot_index, int threads) {
  const int64_t token_dim = plane.num_kv_heads * plane.head_dim;
  const int64_t token_bytes = token_dim * bytes_of(plane.dtype);
  constexpr int64_t kBlock = 32;
  parallel_for((num_rows + kBlock - 1) / kBlock, threads, [=](int64_t block) {
    for (int64_t t = block * kBlock; t < num_rows && t < (block + 1) * kBlock; t++) {
      const int64_t at = slot_page[t] * plane.page_bytes + slot_index[t] * token_bytes;
      store_token(k.data + t * k.stride, plane.keys + at, token_dim, plane.dtype);
      store_token(v.data + t * v.stride, plane.values + at, token_dim, plane.dtype);
    }
  });
}

}  // namespace manylora::MANYLORA_ISA
