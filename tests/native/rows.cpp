// What is computed for each row by itself.
#include "check.hpp"

namespace manylora::test {
namespace {

void add_rms_norm(const Kernels& kernels, Random& random, int64_t rows, int64_t width, int threads) {
  const int64_t stride = width + random.below(5);
  const bool with_delta = random.below(3) != 0;
  // Rows lie `stride` apart, and the last one ends with its values.
  Block<float> x((rows - 1) * stride + width), delta(rows * width), y(rows * width), weight(width);
  random.fill(x);
  random.fill(delta);
  random.fill(weight);
  std::vector<double> before(x.data(), x.data() + x.size());
  kernels.add_rms_norm({x.data(), stride}, {with_delta ? delta.data() : nullptr, width}, {y.data(), width}, rows, width,
                       weight.data(), 0.01f, threads);
  for (int64_t t = 0; t < rows; t++) {
    double squares = 0;
    for (int64_t i = 0; i < width; i++) {
      before[t * stride + i] += with_delta ? delta[t * width + i] : 0;
      expect_near("add_rms_norm adds", kernels.isa, x[t * stride + i], before[t * stride + i], 4, 1);
      squares += before[t * stride + i] * before[t * stride + i];
    }
    const double scale = 1 / std::sqrt(squares / double(width) + 0.01);
    for (int64_t i = 0; i < width; i++)
      expect_near("add_rms_norm", kernels.isa, y[t * width + i], before[t * stride + i] * scale * weight[i], 16,
                  double(width));
  }
}

void rotate(const Kernels& kernels, Random& random, int64_t rows, int threads) {
  const int64_t heads = random.between(1, 4), half = random.between(1, 35), width = heads * 2 * half;
  Block<float> x(rows * width), cos(rows * half), sin(rows * half);
  random.fill(x);
  random.fill(cos);
  random.fill(sin);
  const std::vector<double> before(x.data(), x.data() + x.size());
  kernels.rotate({x.data(), width}, rows, heads, 2 * half, cos.data(), sin.data(), threads);
  for (int64_t t = 0; t < rows; t++)
    for (int64_t head = 0; head < heads; head++)
      for (int64_t i = 0; i < half; i++) {
        const int64_t at = t * width + head * 2 * half + i;
        const double c = cos[t * half + i], s = sin[t * half + i];
        expect_near("rotate", kernels.isa, x[at], before[at] * c - before[at + half] * s, 16, 2);
        expect_near("rotate", kernels.isa, x[at + half], before[at + half] * c + before[at] * s, 16, 2);
      }
}

void argmax(const Kernels& kernels, Random& random, int threads) {
  const int64_t rows = random.between(1, 5), width = random.between(1, 3000), stride = width + random.below(5);
  Block<float> x((rows - 1) * stride + width);
  Block<int64_t> at(rows);
  std::vector<int64_t> want(rows);
  for (int64_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(random.between(-9, 9));  // many are equal
  for (int64_t t = 0; t < rows; t++) {
    float* row = x.data() + t * stride;
    if (random.below(4) == 0) row[random.below(width)] = random.below(2) ? kNaN : HUGE_VALF;
    if (random.below(8) == 0) std::fill(row, row + width, -HUGE_VALF);
    want[t] = 0;
    for (int64_t i = 0; i < width; i++) {
      if (row[i] > row[want[t]]) want[t] = i;
      if (row[i] != row[i]) want[t] = -1, i = width;
    }
    if (want[t] >= 0 && !std::isfinite(row[want[t]])) want[t] = -1;
  }
  kernels.argmax({x.data(), stride}, rows, width, at.data(), threads);
  for (int64_t t = 0; t < rows; t++) expect(at[t] == want[t], "argmax finds the first of the largest", kernels.isa);
}

void silu_mul(const Kernels& kernels, Random& random, int64_t rows, int64_t width, int threads) {
  Block<float> gate_up(rows * 2 * width), y(rows * width);
  random.fill(gate_up);
  kernels.silu_mul({gate_up.data(), 2 * width}, {y.data(), width}, rows, width, threads);
  for (int64_t t = 0; t < rows; t++)
    for (int64_t i = 0; i < width; i++) {
      const double gate = gate_up[t * 2 * width + i], up = gate_up[t * 2 * width + width + i];
      expect_near("silu_mul", kernels.isa, y[t * width + i], gate / (1 + std::exp(-gate)) * up, 16, 4);
    }
}

}  // namespace

void test_rows(const Kernels& kernels, Random& random) {
  const int64_t rows = random.between(1, 40), width = random.between(1, 100);
  const int threads = static_cast<int>(random.between(1, 3));
  add_rms_norm(kernels, random, rows, width, threads);
  rotate(kernels, random, rows, threads);
  silu_mul(kernels, random, rows, width, threads);
  argmax(kernels, random, threads);
}

}  // namespace manylora::test
