// The product in tiles: within the rounding of float32 for floats, and of two bfloat16 for weights of eight bits.
#include "check.hpp"

namespace manylora::test {

void test_tiles(const Kernels& kernels, Random& random) {
  if (!kernels.tile_product) return;
  constexpr int64_t kTile = 16, kStrip = 32, kStep = 32;  // as in tiles.inl
  const int64_t rows = random.between(1, 70), in = random.between(1, 300), out = random.between(1, 200);
  const int64_t steps = (in + kStep - 1) / kStep, strips = (out + kStrip - 1) / kStrip, x_stride = in + random.below(3);
  const bool with_bias = random.below(2), int8 = random.below(2);
  const int64_t parts = int8 ? 0 : random.between(0, 2);  // that are stored
  Block<float> x(rows * x_stride), weight(out * in), scale(out), bias(out), y(rows * out);
  for (const Block<float>* block : {&x, &weight, &scale, &bias}) random.fill(*block);
  for (int64_t i = 0; parts > 0 && i < weight.size(); i++) {
    const float first = widened(upper_half(weight[i]));
    weight[i] = first + (parts == 2 ? widened(upper_half(weight[i] - first)) : 0);
  }
  for (int64_t i = 0; int8 && i < weight.size(); i++) weight[i] = static_cast<float>(random.between(-127, 127));
  Block<float> packed(strips * steps * kStrip * kStep);
  std::memset(packed.data(), 0, packed.size() * sizeof(float));
  Block<uint16_t> stored(parts * packed.size());
  std::memset(stored.data(), 0, stored.size() * sizeof(uint16_t));
  for (int64_t o = 0; o < out; o++)
    for (int64_t i = 0; i < in; i++) {
      const int64_t tile = (o / kStrip * steps + i / kStep) * 2 + o % kStrip / kTile;
      packed[tile * kTile * kStep + i % 16 * kStep + i % kStep / 16 * kTile + o % kTile] = weight[o * in + i];
      float left = weight[o * in + i];
      for (int64_t part = 0; part < parts; part++) {
        const int64_t part_tile = (tile / 2 * parts + part) * 2 + tile % 2;
        const uint16_t bits = upper_half(left);
        stored[part_tile * kTile * kStep + i % 16 * kStep + o % kTile * 2 + i % kStep / 16] = bits;
        left -= widened(bits);
      }
    }
  Block<int8_t> integers(packed.size());
  for (int64_t i = 0; int8 && i < packed.size(); i++) integers[i] = static_cast<int8_t>(packed[i]);
  const void* const in_memory = int8        ? static_cast<const void*>(integers.data())
                                : parts > 0 ? static_cast<const void*>(stored.data())
                                            : packed.data();
  kernels.tile_product({x.data(), x_stride}, rows,
                       {in_memory, int8 ? scale.data() : nullptr, with_bias ? bias.data() : nullptr, parts, out, in},
                       {y.data(), out}, static_cast<int>(random.between(1, 3)));
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = 0; o < out; o++) {
      double want = 0, magnitude = 0;
      for (int64_t i = 0; i < in; i++) {
        const double product = double(x[t * x_stride + i]) * double(weight[o * in + i]);
        want += product;
        magnitude += product * product;
      }
      // Of x, a weight of eight bits sees two parts: 2^-17 of each value, where a float is rounded to 2^-24.
      const double largest = std::sqrt(magnitude) * (int8 ? std::fabs(scale[o]) * 16 : 1);
      want = want * (int8 ? scale[o] : 1) + (with_bias ? bias[o] : 0);
      expect_near("tile_product", kernels.isa, y[t * out + o], want, largest, int8 ? 1 : static_cast<double>(in));
    }
}

}  // namespace manylora::test
