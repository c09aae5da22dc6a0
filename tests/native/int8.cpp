// The product on eight-bit integers, on inputs that are integers already: then it must be exact.
#include "check.hpp"

namespace manylora::test {

void test_int8(const Kernels& kernels, Random& random) {
  constexpr int64_t kStrip = 32, kDepth = 4, kGroup = 32;  // as in int8.inl
  const int64_t rows = random.between(1, 20), in = random.below(2) ? random.between(1, 150) : 32 * random.between(1, 5), out = random.between(1, 100);
  const int64_t depth = (in + kDepth - 1) / kDepth * kDepth, strips = (out + kStrip - 1) / kStrip;
  Block<float> x(rows * in), scale(out), bias(out), y(rows * out);
  random.fill(scale);
  random.fill(bias);
  // Each group of a row reaches 127, so that its scale is 1.
  for (int64_t i = 0; i < x.size(); i++)
    x[i] = i % in % kGroup == 0 ? 127.0f : static_cast<float>(random.between(-127, 127));
  std::vector<int64_t> weight(out * in);
  Block<uint8_t> packed(strips * kStrip * depth);
  for (int64_t i = 0; i < packed.size(); i++) packed[i] = 128;
  for (int64_t o = 0; o < out; o++)
    for (int64_t i = 0; i < in; i++) {
      weight[o * in + i] = random.between(-127, 127);
      packed[(o / kStrip * depth / kDepth + i / kDepth) * kStrip * kDepth + o % kStrip * kDepth + i % kDepth] =
          static_cast<uint8_t>(128 + weight[o * in + i]);
    }
  const bool with_bias = random.below(2);
  kernels.int8_product({x.data(), in}, rows,
                       {packed.data(), scale.data(), with_bias ? bias.data() : nullptr, out, in}, {y.data(), out},
                       static_cast<int>(random.between(1, 3)));
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = 0; o < out; o++) {
      double want = 0;
      for (int64_t i = 0; i < in; i++) want += double(x[t * in + i]) * double(weight[o * in + i]);
      want = want * scale[o] + (with_bias ? bias[o] : 0);
      expect_near("int8_product", kernels.isa, y[t * out + o], want, std::fabs(want), 4);
    }
}

}  // namespace manylora::test
