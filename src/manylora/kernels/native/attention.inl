// Paged attention, and the writing of new keys and values. Included by kernels.inl only.
//
// A row's sums run over its tokens in order, whatever else is in the batch.
#pragma once

#include <type_traits>
#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

constexpr int kQueries = 4;       // queries that share each key and value that is read
constexpr int kTaskQueries = 32;  // queries of a task
constexpr int64_t kAhead = 8;     // tokens between what is read and what is fetched from memory meanwhile

// The keys or values of one head of one sequence, token by token.
template <class T>
struct Tokens {
  const uint8_t* plane;
  const int32_t* pages;
  int64_t page_bytes, page_tokens, token_dim, head_dim, head_offset;

  // Calls use(token, pointer to head_dim elements, count) for tokens begin..end, `count` neighbours of a page at a time,
  // token_dim elements apart; count is kMany as often as possible, else 1, and known to the compiler.
  template <int kMany, class Use>
  void each(int64_t begin, int64_t end, const Use& use) const {
    while (begin < end) {
      const int64_t page = begin / page_tokens;
      const int64_t stop = (page + 1) * page_tokens < end ? (page + 1) * page_tokens : end;
      const T* at = address(begin);
      if (stop < end) prefetch(address(stop), kAhead < end - stop ? kAhead : end - stop);
      for (; begin + kMany <= stop; begin += kMany, at += kMany * token_dim) {
        prefetch(at + kAhead * token_dim, kMany);
        use(begin, at, std::integral_constant<int, kMany>{});
      }
      for (; begin < stop; begin++, at += token_dim) use(begin, at, std::integral_constant<int, 1>{});
    }
  }

  const T* address(int64_t token) const {
    const int64_t page = token / page_tokens;
    return reinterpret_cast<const T*>(plane + pages[page] * page_bytes) + (token - page * page_tokens) * token_dim +
           head_offset;
  }

  // One head of many tokens is a row of short pieces, which the processor does not foresee.
  void prefetch(const T* from, int64_t tokens) const {
    for (int64_t i = 0; i < tokens; i++)
      for (int64_t d = 0; d < head_dim; d += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(from + i * token_dim + d);
  }
};

// N queries (rows and heads) that read the same key head.
template <int N>
struct Queries {
  const float* q[N];
  float* out[N];
  int64_t visible[N];  // tokens that each may see, not falling
};

template <class T, int N>
static void score(const Queries<N>& queries, const Tokens<T>& keys, int64_t head_dim, float scale, float* scores,
                  int64_t stride) {
  keys.template each<4>(0, queries.visible[N - 1], [&](int64_t token, const T* key, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vec total[N][kCount] = {};
    const auto accumulate = [&](const auto& load_at) {
      Vec k[kCount];
      for (int i = 0; i < kCount; i++) k[i] = load_at(key + i * keys.token_dim);
      for (int n = 0; n < N; n++) {
        const Vec q = load_at(queries.q[n]);
        for (int i = 0; i < kCount; i++) total[n][i] += q * k[i];
      }
    };
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) accumulate([d](const auto* from) { return load(from + d); });
    if (d < head_dim) accumulate([=](const auto* from) { return load_part(from + d, head_dim - d); });
    for (int n = 0; n < N; n++) {
      float* to = scores + n * stride + token;
      if constexpr (kCount == 4)
        sum_four(total[n], to);
      else
        to[0] = sum(total[n][0]);
      for (int i = 0; i < kCount; i++) to[i] *= scale;
    }
  });
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

// out[n] = sum over tokens of weight[n][token] * value / sum of weights, for columns d..d + C vectors.
template <class T, int N, int C>
static void weigh(const Queries<N>& queries, const Tokens<T>& values, int64_t d, const float* weights, int64_t stride,
                  const float* sums) {
  Vec total[N][C] = {};
  values.template each<1>(0, queries.visible[0], [&](int64_t token, const T* value, auto) {
    Vec v[C];
    for (int c = 0; c < C; c++) v[c] = load(value + d + c * kLanes);
    for (int n = 0; n < N; n++) {
      const Vec weight = broadcast(weights[n * stride + token]);
      for (int c = 0; c < C; c++) total[n][c] += weight * v[c];
    }
  });
  for (int n = 0; n < N; n++) {
    // What a later row sees and the first does not.
    values.template each<1>(queries.visible[0], queries.visible[n], [&](int64_t token, const T* value, auto) {
      const Vec weight = broadcast(weights[n * stride + token]);
      for (int c = 0; c < C; c++) total[n][c] += weight * load(value + d + c * kLanes);
    });
    for (int c = 0; c < C; c++) store(queries.out[n] + d + c * kLanes, total[n][c] / sums[n]);
  }
}

template <class T, int N>
static void weigh_rest(const Queries<N>& queries, const Tokens<T>& values, int64_t d, int64_t head_dim,
                       const float* weights, int64_t stride, const float* sums) {
  for (int n = 0; n < N; n++) {
    Vec total = {};
    values.template each<1>(0, queries.visible[n], [&](int64_t token, const T* value, auto) {
      total += broadcast(weights[n * stride + token]) * load_part(value + d, head_dim - d);
    });
    store_part(queries.out[n] + d, total / sums[n], head_dim - d);
  }
}

template <class T, int N>
static void attend_together(const Queries<N>& queries, const Tokens<T>& keys, const Tokens<T>& values,
                            int64_t head_dim, float scale) {
  static thread_local std::vector<float> scores;
  const int64_t stride = (queries.visible[N - 1] / kLanes + 1) * kLanes;
  if (scores.size() < static_cast<size_t>(N * stride)) scores.resize(N * stride);
  score<T, N>(queries, keys, head_dim, scale, scores.data(), stride);
  float sums[N];
  for (int n = 0; n < N; n++) sums[n] = exponentiate(scores.data() + n * stride, queries.visible[n]);
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
    weigh<T, N, 4>(queries, values, d, scores.data(), stride, sums);
  for (; d + kLanes <= head_dim; d += kLanes) weigh<T, N, 1>(queries, values, d, scores.data(), stride, sums);
  if (d < head_dim) weigh_rest<T, N>(queries, values, d, head_dim, scores.data(), stride, sums);
}

struct AttendTask {
  int64_t sequence, kv_head, first_query;
};

template <class T>
static void attend_task(const AttendTask& task, Rows q, Rows out, int64_t num_heads, const KvPlane& plane,
                        const Sequences& sequences, float scale) {
  const int64_t group = num_heads / plane.num_kv_heads;
  const int64_t first_row = sequences.query_start[task.sequence];
  const int64_t num_new = sequences.query_start[task.sequence + 1] - first_row;
  const int64_t hidden_from_first = num_new - 1;  // tokens of the context that the first new one may not see
  const int32_t* pages = sequences.block_table + task.sequence * sequences.table_width;
  const int64_t token_dim = plane.num_kv_heads * plane.head_dim;
  const Tokens<T> keys{plane.keys, pages, plane.page_bytes, plane.page_tokens, token_dim,
                       plane.head_dim, task.kv_head * plane.head_dim};
  Tokens<T> values = keys;
  values.plane = plane.values;

  const auto fill = [&](auto& queries, int64_t query, int count) {
    for (int n = 0; n < count; n++) {
      const int64_t row = (query + n) / group;
      const int64_t column = (task.kv_head * group + (query + n) % group) * plane.head_dim;
      queries.q[n] = q.data + (first_row + row) * q.stride + column;
      queries.out[n] = out.data + (first_row + row) * out.stride + column;
      queries.visible[n] = sequences.context_len[task.sequence] - hidden_from_first + row;
    }
  };
  const int64_t all = num_new * group;
  const int64_t last = task.first_query + kTaskQueries < all ? task.first_query + kTaskQueries : all;
  int64_t query = task.first_query;
  for (; query + kQueries <= last; query += kQueries) {
    Queries<kQueries> four;
    fill(four, query, kQueries);
    attend_together<T, kQueries>(four, keys, values, plane.head_dim, scale);
  }
  if (query + 3 == last) {
    Queries<3> three;
    fill(three, query, 3);
    attend_together<T, 3>(three, keys, values, plane.head_dim, scale);
    return;
  }
  for (; query < last; query++) {
    Queries<1> one;
    fill(one, query, 1);
    attend_together<T, 1>(one, keys, values, plane.head_dim, scale);
  }
}

static void attend(Rows q, Rows out, int64_t num_heads, KvPlane plane, Sequences sequences, float scale, int threads) {
  static thread_local std::vector<AttendTask> tasks;
  tasks.clear();
  const int64_t group = num_heads / plane.num_kv_heads;
  for (int64_t i = 0; i < sequences.count; i++) {
    const int64_t all = (sequences.query_start[i + 1] - sequences.query_start[i]) * group;
    // From the end of a chunk to its beginning: the last queries see most and take longest.
    for (int64_t first = (all - 1) / kTaskQueries * kTaskQueries; all > 0 && first >= 0; first -= kTaskQueries)
      for (int64_t head = 0; head < plane.num_kv_heads; head++) tasks.push_back({i, head, first});
  }
  const AttendTask* task_list = tasks.data();
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [=](int64_t i) {
    switch (plane.dtype) {
      case DType::kFloat32: return attend_task<float>(task_list[i], q, out, num_heads, plane, sequences, scale);
      case DType::kBFloat16: return attend_task<BFloat16>(task_list[i], q, out, num_heads, plane, sequences, scale);
      case DType::kHalf: return attend_task<Half>(task_list[i], q, out, num_heads, plane, sequences, scale);
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
  const int64_t token_bytes = token_dim * (plane.dtype == DType::kFloat32 ? 4 : 2);
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
