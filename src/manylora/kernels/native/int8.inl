// The base product on eight-bit integers: weights with a scale per output, activations with a scale per row.
// Included by kernels.inl only.
//
// Rows of x are quantised on their own and integers are summed exactly, so a row's result has the same bits in any batch.
// Weights are packed by native/int8.py: for each strip of kStrip outputs and each four inputs, kStrip * 4 values.
#pragma once

#include <type_traits>
#include <vector>

#include "parallel.hpp"
#include "rowwise.inl"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

constexpr int kStrip = 32;        // outputs side by side in the packed weight
constexpr int kDepth = 4;         // inputs that one instruction multiplies and adds
constexpr int kProductRows = 12;  // rows that share the strip that is read

// The activations that an instruction takes are unsigned, so zero is stored as 128 and taken back at the end.
constexpr int kZero = 128;

// Rows that are multiplied together lie together: for each four inputs, the four of each row of the block.
struct RowBlock {
  int64_t first;
  int rows;
};

// The block of row t: twelve rows as often as possible, then four, then one.
static inline RowBlock block_of(int64_t t, int64_t num_rows) {
  const int64_t twelves = num_rows / kProductRows * kProductRows;
  if (t < twelves) return {t / kProductRows * kProductRows, kProductRows};
  const int64_t fours = (num_rows - twelves) / 4 * 4;
  if (t < twelves + fours) return {twelves + (t - twelves) / 4 * 4, 4};
  return {t, 1};
}

// One row to integers in 1..255, kDepth of them every `step` bytes; what is behind its width is zero. Returns the scale.
static float quantise_row(const float* x, int64_t width, uint8_t* to, int64_t step) {
  Vec most = {}, nothing = {};
  const auto look = [&](Vec v) {
    most = larger(most, larger(v, -v));
    nothing += v - v;  // NaN where v is no finite number
  };
  for_each_vector(
      width, [&](int64_t i) { look(load(x + i)); }, [&](int64_t i, int64_t n) { look(load_part(x + i, n)); });
  const float highest = largest(most);
  const float inverse = highest > 0 ? 127.0f / highest : 0.0f;
  // What is no number cannot be an integer either: the scale hands it on to the whole row.
  const float scale = highest / 127.0f + sum(nothing);

  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the last bits
  const auto put = [&](int64_t i, Vec v, int64_t count) {
    const VecB integers = __builtin_convertvector((VecI)(v * inverse + (kRound + kZero)) & 0xff, VecB);
    uint8_t bytes[kLanes];
    std::memcpy(bytes, &integers, sizeof bytes);
    for (int64_t lane = 0; lane < count; lane += kDepth)
      std::memcpy(to + (i + lane) / kDepth * step, bytes + lane, kDepth);
  };
  for_each_vector(
      width, [&](int64_t i) { put(i, load(x + i), kLanes); },
      // load_part puts zeros behind the row, which is what belongs there.
      [&](int64_t i, int64_t n) { put(i, load_part(x + i, n), n); });
  return scale;
}

#if defined(__AVX512VNNI__)

// total[m][strip] += sum over the depth of a[m] * w, for M rows.
template <int M>
static void multiply_strip(const uint8_t* a, const int8_t* w, int64_t depth, int32_t totals[kProductRows][kStrip]) {
  __m512i total[M][2] = {};
  for (int64_t k = 0; k < depth; k += kDepth, a += M * kDepth, w += kStrip * kDepth) {
    const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
    MANYLORA_UNROLL for (int m = 0; m < M; m++) {
      int32_t four;
      std::memcpy(&four, a + m * kDepth, sizeof four);
      const __m512i row = _mm512_set1_epi32(four);
      total[m][0] = _mm512_dpbusd_epi32(total[m][0], row, low);
      total[m][1] = _mm512_dpbusd_epi32(total[m][1], row, high);
    }
  }
  MANYLORA_UNROLL for (int m = 0; m < M; m++) {
    _mm512_storeu_si512(totals[m], total[m][0]);
    _mm512_storeu_si512(totals[m] + 16, total[m][1]);
  }
}

#else

template <int M>
static void multiply_strip(const uint8_t* a, const int8_t* w, int64_t depth, int32_t totals[kProductRows][kStrip]) {
  MANYLORA_UNROLL for (int m = 0; m < M; m++) std::memset(totals[m], 0, sizeof totals[m]);
  for (int64_t k = 0; k < depth; k += kDepth, a += M * kDepth, w += kStrip * kDepth)
    MANYLORA_UNROLL for (int m = 0; m < M; m++)
      for (int o = 0; o < kStrip; o++)
        for (int d = 0; d < kDepth; d++) totals[m][o] += static_cast<int32_t>(a[m * kDepth + d]) * w[o * kDepth + d];
}

#endif

template <int M>
static void product_block(const uint8_t* a, int64_t depth, const float* row_scale, const int8_t* w,
                          const float* weight_scale, const int32_t* weight_sum, const float* bias, int64_t outputs,
                          float* y, int64_t y_stride) {
  int32_t totals[kProductRows][kStrip];
  multiply_strip<M>(a, w, depth, totals);
  MANYLORA_UNROLL for (int m = 0; m < M; m++)
    for (int64_t o = 0; o < outputs; o++) {
      const float exact = static_cast<float>(totals[m][o] - kZero * weight_sum[o]);
      y[m * y_stride + o] = exact * (row_scale[m] * weight_scale[o]) + (bias == nullptr ? 0.0f : bias[o]);
    }
}

static void int8_product(Rows x, int64_t num_rows, Int8Weight weight, Rows y, int threads) {
  static thread_local std::vector<uint8_t> integers;
  static thread_local std::vector<float> scales;
  const int64_t depth = (weight.inputs + kDepth - 1) / kDepth * kDepth;
  integers.resize(num_rows * depth);
  scales.resize(num_rows);
  uint8_t* a = integers.data();
  float* row_scale = scales.data();
  for_each_row(num_rows, threads, [=](int64_t t) {
    const RowBlock block = block_of(t, num_rows);
    uint8_t* to = a + block.first * depth + (t - block.first) * kDepth;
    row_scale[t] = quantise_row(x.data + t * x.stride, weight.inputs, to, block.rows * kDepth);
  });

  // A task is some strips, which stay in the second cache, and all rows, so that each weight is read from memory once.
  const int64_t strips = (weight.outputs + kStrip - 1) / kStrip;
  constexpr int64_t kTaskStrips = 8;
  parallel_for((strips + kTaskStrips - 1) / kTaskStrips, threads, [=](int64_t task) {
    const int64_t begin = task * kTaskStrips;
    const int64_t end = begin + kTaskStrips < strips ? begin + kTaskStrips : strips;
    for (int64_t t = 0; t < num_rows;) {
      const RowBlock block = block_of(t, num_rows);
      for (int64_t s = begin; s < end; s++) {
        const int64_t first = s * kStrip, left = weight.outputs - first;
        const int64_t outputs = left < kStrip ? left : kStrip;
        const auto multiply = [&](auto rows) {
          product_block<decltype(rows)::value>(
              a + t * depth, depth, row_scale + t, weight.packed + first * depth, weight.scale + first,
              weight.sum + first, weight.bias == nullptr ? nullptr : weight.bias + first, outputs,
              y.data + t * y.stride + first, y.stride);
        };
        switch (block.rows) {
          case kProductRows: multiply(std::integral_constant<int, kProductRows>{}); break;
          case 4: multiply(std::integral_constant<int, 4>{}); break;
          default: multiply(std::integral_constant<int, 1>{});
        }
      }
      t += block.rows;
    }
  });
}

}  // namespace manylora::MANYLORA_ISA
