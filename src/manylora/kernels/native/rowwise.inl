// What is computed for each row of activations by itself. Included by kernels.inl only.
#pragma once

#include <cmath>
#include <limits>

#include "parallel.hpp"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

constexpr int64_t kRowBlock = 16;  // rows of a task: handing out single rows costs more than they do

template <class Work>
static inline void for_each_row(int64_t num_rows, int threads, const Work& work) {
  parallel_for((num_rows + kRowBlock - 1) / kRowBlock, threads, [=](int64_t block) {
    for (int64_t t = block * kRowBlock; t < num_rows && t < (block + 1) * kRowBlock; t++) work(t);
  });
}

// Calls whole(i) for each whole vector of 0..width and part(i, count) for what is left.
template <class Whole, class Part>
static inline void for_each_vector(int64_t width, const Whole& whole, const Part& part) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) whole(i);
  if (i < width) part(i, width - i);
}

static void rotate(Rows x, int64_t num_rows, int64_t num_heads, int64_t head_dim, const float* cos, const float* sin,
                   int threads) {
  const int64_t half = head_dim / 2;
  for_each_row(num_rows, threads, [=](int64_t t) {
    const float *c = cos + t * half, *s = sin + t * half;
    for (int64_t head = 0; head < num_heads; head++) {
      float *first = x.data + t * x.stride + head * head_dim, *second = first + half;
      for_each_vector(
          half,
          [=](int64_t i) {
            const Vec a = load(first + i), b = load(second + i);
            store(first + i, a * load(c + i) - b * load(s + i));
            store(second + i, b * load(c + i) + a * load(s + i));
          },
          [=](int64_t i, int64_t n) {
            const Vec a = load_part(first + i, n), b = load_part(second + i, n);
            store_part(first + i, a * load_part(c + i, n) - b * load_part(s + i, n), n);
            store_part(second + i, b * load_part(c + i, n) + a * load_part(s + i, n), n);
          });
    }
  });
}

static void add_rms_norm(Rows x, Rows delta, Rows y, int64_t num_rows, int64_t width, const float* weight, float eps,
                         int threads) {
  for_each_row(num_rows, threads, [=](int64_t t) {
    float *row = x.data + t * x.stride, *to = y.data + t * y.stride;
    if (delta.data != nullptr) {
      const float* added = delta.data + t * delta.stride;
      for_each_vector(
          width, [=](int64_t i) { store(row + i, load(row + i) + load(added + i)); },
          [=](int64_t i, int64_t n) { store_part(row + i, load_part(row + i, n) + load_part(added + i, n), n); });
    }
    Vec squares = {};
    for_each_vector(
        width, [&](int64_t i) { squares += load(row + i) * load(row + i); },
        [&](int64_t i, int64_t n) { squares += load_part(row + i, n) * load_part(row + i, n); });
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
    for_each_vector(
        width, [=](int64_t i) { store(to + i, load(row + i) * scale * load(weight + i)); },
        [=](int64_t i, int64_t n) { store_part(to + i, load_part(row + i, n) * scale * load_part(weight + i, n), n); });
  });
}

// Where each row's largest value is, the first of equal ones; -1 where it is infinite, or some value is NaN.
static void argmax(Rows x, int64_t num_rows, int64_t width, int64_t* at, int threads) {
  constexpr int64_t kPiece = 1024;  // what is gone through again to find the place
  parallel_for(num_rows, threads, [=](int64_t t) {
    const float* row = x.data + t * x.stride;
    float highest = -std::numeric_limits<float>::infinity();
    int64_t place = -1;
    bool is_number = true;
    for (int64_t first = 0; first < width; first += kPiece) {
      const int64_t last = first + kPiece < width ? first + kPiece : width;
      Vec top = broadcast(row[first]);
      VecI differs = {};
      int64_t i = first;
      for (; i + kLanes <= last; i += kLanes) {
        const Vec v = load(row + i);
        top = larger(v, top);
        differs |= (VecI)(v != v);
      }
      float piece = largest(top);
      for (; i < last; i++) {
        piece = row[i] > piece ? row[i] : piece;
        is_number = is_number && row[i] == row[i];
      }
      for (int lane = 0; lane < kLanes; lane++) is_number = is_number && differs[lane] == 0;
      if (piece > highest) highest = piece, place = first;
    }
    if (!is_number || !std::isfinite(highest)) {
      at[t] = -1;
      return;
    }
    while (row[place] != highest) place++;
    at[t] = place;
  });
}

static inline Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

static void silu_mul(Rows gate_up, Rows y, int64_t num_rows, int64_t width, int threads) {
  for_each_row(num_rows, threads, [=](int64_t t) {
    const float *gate = gate_up.data + t * gate_up.stride, *up = gate + width;
    float* to = y.data + t * y.stride;
    for_each_vector(
        width, [=](int64_t i) { store(to + i, silu(load(gate + i)) * load(up + i)); },
        [=](int64_t i, int64_t n) { store_part(to + i, silu(load_part(gate + i, n)) * load_part(up + i, n), n); });
  });
}

}  // namespace manylora::MANYLORA_ISA
