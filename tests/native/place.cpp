// Laying values out as rank rows.
#include "check.hpp"

namespace manylora::test {

// Rows side by side in the source or as columns of it, some of them neighbours.
void test_place(const Kernels& kernels, Random& random) {
  const int64_t count = random.between(1, 20), length = random.between(1, 20), stride = random.between(1, 20);
  const int64_t size = 2 << random.below(2);
  const DType dtype = size == 4 ? DType::kFloat32 : random.below(2) ? DType::kBFloat16 : DType::kHalf;
  Block<int64_t> begin(count), strides(count), lengths(count), offset(count);
  int64_t end = 0;
  for (int64_t row = 0; row < count; row++) {
    begin[row] = row > 0 && random.below(8) ? begin[row - 1] + 1 : random.below(40);
    strides[row] = row > 0 && random.below(12) ? strides[row - 1] : random.below(2) ? stride : 1;
    lengths[row] = row > 0 && random.below(12) ? lengths[row - 1] : length;
    offset[row] = 3 + (count - 1 - row) * length * size;
    end = std::max(end, begin[row] + (lengths[row] - 1) * strides[row] + 1);
  }
  Block<uint8_t> source(end * size), image(count * length * size + 3);
  for (int64_t i = 0; i < source.size(); i++) source[i] = static_cast<uint8_t>(random.below(256));
  kernels.place_rows(source.data(), dtype, image.data(),
                     {count, begin.data(), strides.data(), lengths.data(), offset.data()});
  for (int64_t row = 0; row < count; row++)
    for (int64_t i = 0; i < lengths[row]; i++)
      expect(std::memcmp(image.data() + offset[row] + i * size,
                         source.data() + (begin[row] + i * strides[row]) * size, size) == 0, "place_rows", kernels.isa);
  for (int i = 0; i < 3; i++) expect(image[i] == 0xff, "place_rows writes nothing else", kernels.isa);
}

// Rows of eight bits: a scale and the nearest values. Sources of two and of four bytes hold the same numbers.
void test_round(const Kernels& kernels, Random& random) {
  const int64_t length = random.between(1, 40), stride = random.between(1, 4);
  const DType dtype = static_cast<DType>(random.below(3));
  Block<uint8_t> source(length * stride * bytes_of(dtype));
  std::vector<float> values;
  for (int64_t i = 0; i < length * stride; i++) values.push_back(put(random, dtype, source.data() + i * bytes_of(dtype)));
  Block<uint8_t> image(row_bytes(DType::kInt8, length) + 3);
  const int64_t begin = 0, offset = 3;
  kernels.round_rows(source.data(), dtype, image.data(), {1, &begin, &stride, &length, &offset});
  float largest = 0, scale;
  for (int64_t i = 0; i < length; i++) largest = std::fmax(largest, std::fabs(values[i * stride]));
  std::memcpy(&scale, image.data() + offset, sizeof scale);
  expect(scale == largest / 127.0f, "round_rows (scale)", kernels.isa);
  for (int64_t i = 0; i < length; i++) {
    const float got = scale * static_cast<float>(static_cast<int8_t>(image[offset + 4 + i]));
    expect(std::fabs(got - values[i * stride]) <= scale * 0.5001f, "round_rows (nearest)", kernels.isa);
  }
  for (int i = 0; i < 3; i++) expect(image[i] == 0xff, "round_rows writes nothing else", kernels.isa);
}

}  // namespace manylora::test
