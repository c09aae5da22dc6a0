// The base product on eight-bit integers: weights with a scale per output, activations with a scale per row and kGroup
// inputs: a few inputs of a row are far larger than the rest, and would leave the rest a few steps of a common scale.
// Included by kernels.inl only.
//
// Rows of x are rounded on their own and the sum of a group is exact, so a row's result has the same bits in any batch.
// Weights are packed by native/int8.py: for each strip of kStrip outputs and each four inputs, kStrip * 4 values.
#pragma once

#include <type_traits>
#include <vector>

#include "parallel.hpp"
#include "rowwise.inl"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

constexpr int kStrip = 32;       // outputs side by side in the packed weight
constexpr int kDepth = 4;        // inputs that one instruction multiplies and adds
constexpr int kGroup = 32;       // inputs of a row that share a scale
constexpr int kProductRows = 6;  // rows that share the strip that is read; as many as registers hold the sums of

// The instruction takes one side unsigned. Weights are, with 128 for zero; 128 times the sum of the row's integers is
// what each sum begins with less, so that it comes out as if they were not.
constexpr int kZero = 128;

// Rows that are multiplied together lie together: for each four inputs, the four of each row of the block.
struct RowBlock {
  int64_t first;
  int rows;
};

// The block of row t: six rows as often as possible, then two, then one.
static inline RowBlock block_of(int64_t t, int64_t num_rows) {
  int64_t begin = 0;
  for (const int rows : {kProductRows, 2, 1}) {
    const int64_t end = begin + (num_rows - begin) / rows * rows;
    if (t < end) return {begin + (t - begin) / rows * rows, rows};
    begin = end;
  }
  return {t, 1};
}

// What a block of `rows` rows is multiplied as. Group after group, and in each row after row.
struct Rounded {
  const int8_t* integers;
  const float* scale;
  const int32_t* start;  // what the sum of each group begins with
};

// `count` <= kGroup inputs of a row to integers in -127..127, kDepth of them every `step` bytes.
static void round_group(const float* x, int64_t count, int8_t* to, int64_t step, float* scale, int32_t* start) {
  Vec most = {}, nothing = {};
  const auto look = [&](Vec v) {
    most = larger(most, larger(v, -v));
    nothing += v - v;  // NaN where v is no finite number
  };
  for_each_vector(
      count, [&](int64_t i) { look(load(x + i)); }, [&](int64_t i, int64_t n) { look(load_part(x + i, n)); });
  const float highest = largest(most);
  const float inverse = highest > 0 ? 127.0f / highest : 0.0f;
  // What is no number cannot be an integer either: the scale hands it on to the whole row.
  *scale = highest / 127.0f + sum(nothing);

  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the last bits
  VecI total = {};
  const auto put = [&](int64_t i, Vec v, int64_t n) {
    const VecI integers = (VecI)(v * inverse + kRound) - (VecI)broadcast(kRound);
    total += integers;
    const VecB narrow = __builtin_convertvector(integers & 0xff, VecB);
    int8_t bytes[kLanes];
    std::memcpy(bytes, &narrow, sizeof bytes);
    if (step == kDepth && n == kLanes) {
      std::memcpy(to + i, bytes, sizeof bytes);
      return;
    }
    for (int64_t lane = 0; lane < n; lane += kDepth) std::memcpy(to + (i + lane) / kDepth * step, bytes + lane, kDepth);
  };
  for_each_vector(
      count, [&](int64_t i) { put(i, load(x + i), kLanes); },
      // load_part puts zeros behind the row, which is what belongs there.
      [&](int64_t i, int64_t n) { put(i, load_part(x + i, n), n); });
  *start = 0;
  if (std::isfinite(*scale)) *start = -kZero * sum(total);
}

#if defined(__AVX512VNNI__)

// sums[m][strip] = sum over the groups of scale[m] * (integers of row m) @ (integers of the strip), for M rows.
template <int M>
static void multiply_strip(Rounded a, const uint8_t* w, int64_t depth, float sums[M][kStrip]) {
  __m512 sum[M][2] = {};
  for (int64_t first = 0; first < depth; first += kGroup, a.scale += M, a.start += M) {
    __m512i total[M][2];
    MANYLORA_UNROLL for (int m = 0; m < M; m++) total[m][0] = total[m][1] = _mm512_set1_epi32(a.start[m]);
    const int64_t end = first + kGroup < depth ? first + kGroup : depth;
    for (int64_t k = first; k < end; k += kDepth, a.integers += M * kDepth, w += kStrip * kDepth) {
      const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
      MANYLORA_UNROLL for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, a.integers + m * kDepth, sizeof four);
        const __m512i row = _mm512_set1_epi32(four);
        total[m][0] = _mm512_dpbusd_epi32(total[m][0], low, row);
        total[m][1] = _mm512_dpbusd_epi32(total[m][1], high, row);
      }
    }
    MANYLORA_UNROLL for (int m = 0; m < M; m++) {
      const __m512 scale = _mm512_set1_ps(a.scale[m]);
      sum[m][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[m][0]), scale, sum[m][0]);
      sum[m][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[m][1]), scale, sum[m][1]);
    }
  }
  MANYLORA_UNROLL for (int m = 0; m < M; m++) {
    _mm512_storeu_ps(sums[m], sum[m][0]);
    _mm512_storeu_ps(sums[m] + 16, sum[m][1]);
  }
}

#else

template <int M>
static void multiply_strip(Rounded a, const uint8_t* w, int64_t depth, float sums[M][kStrip]) {
  MANYLORA_UNROLL for (int m = 0; m < M; m++) std::memset(sums[m], 0, sizeof sums[m]);
  for (int64_t first = 0; first < depth; first += kGroup, a.scale += M, a.start += M) {
    int32_t total[M][kStrip];
    for (int m = 0; m < M; m++)
      for (int o = 0; o < kStrip; o++) total[m][o] = a.start[m];
    const int64_t end = first + kGroup < depth ? first + kGroup : depth;
    for (int64_t k = first; k < end; k += kDepth, a.integers += M * kDepth, w += kStrip * kDepth)
      MANYLORA_UNROLL for (int m = 0; m < M; m++)
        for (int o = 0; o < kStrip; o++)
          for (int d = 0; d < kDepth; d++) total[m][o] += static_cast<int32_t>(w[o * kDepth + d]) * a.integers[m * kDepth + d];
    for (int m = 0; m < M; m++)
      for (int o = 0; o < kStrip; o++) sums[m][o] += static_cast<float>(total[m][o]) * a.scale[m];
  }
}

#endif

template <int M>
static void product_block(Rounded a, int64_t depth, const uint8_t* w, const float* weight_scale, const float* bias,
                          int64_t outputs, float* y, int64_t y_stride) {
  float sums[M][kStrip];
  multiply_strip<M>(a, w, depth, sums);
  MANYLORA_UNROLL for (int m = 0; m < M; m++)
    for (int64_t o = 0; o < outputs; o++)
      y[m * y_stride + o] = sums[m][o] * weight_scale[o] + (bias == nullptr ? 0.0f : bias[o]);
}

static void int8_product(Rows x, int64_t num_rows, Int8Weight weight, Rows y, int threads) {
  static thread_local std::vector<int8_t> integers;
  static thread_local std::vector<float> scales;
  static thread_local std::vector<int32_t> starts;
  const int64_t depth = (weight.inputs + kDepth - 1) / kDepth * kDepth;
  const int64_t groups = (depth + kGroup - 1) / kGroup;
  integers.resize(num_rows * depth);
  scales.resize(num_rows * groups);
  starts.resize(num_rows * groups);
  int8_t* a = integers.data();
  float* scale = scales.data();
  int32_t* start = starts.data();
  for_each_row(num_rows, threads, [=](int64_t t) {
    const RowBlock block = block_of(t, num_rows);
    const int64_t m = t - block.first, step = block.rows * kDepth;
    int8_t* to = a + block.first * depth + m * kDepth;
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = group * kGroup, left = weight.inputs - first;
      const int64_t at = block.first * groups + group * block.rows + m;
      round_group(x.data + t * x.stride + first, left < kGroup ? left : kGroup, to + first / kDepth * step, step,
                  scale + at, start + at);
    }
  });

  // A task is some strips, which stay in the second cache, and all rows, so that each weight is read from memory once.
  const int64_t strips = (weight.outputs + kStrip - 1) / kStrip;
  constexpr int64_t kTaskStrips = 8;
  parallel_for((strips + kTaskStrips - 1) / kTaskStrips, threads, [=](int64_t task) {
    const int64_t begin = task * kTaskStrips;
    const int64_t end = begin + kTaskStrips < strips ? begin + kTaskStrips : strips;
    for (int64_t t = 0; t < num_rows;) {
      const RowBlock block = block_of(t, num_rows);
      const Rounded rounded = {a + t * depth, scale + t * groups, start + t * groups};
      for (int64_t s = begin; s < end; s++) {
        const int64_t first = s * kStrip, left = weight.outputs - first;
        const int64_t outputs = left < kStrip ? left : kStrip;
        const auto multiply = [&](auto rows) {
          product_block<decltype(rows)::value>(
              rounded, depth, weight.packed + first * depth, weight.scale + first,
              weight.bias == nullptr ? nullptr : weight.bias + first, outputs, y.data + t * y.stride + first, y.stride);
        };
        switch (block.rows) {
          case kProductRows: multiply(std::integral_constant<int, kProductRows>{}); break;
          case 2: multiply(std::integral_constant<int, 2>{}); break;
          default: multiply(std::integral_constant<int, 1>{});
        }
      }
      t += block.rows;
    }
  });
}

}  // namespace manylora::MANYLORA_ISA
