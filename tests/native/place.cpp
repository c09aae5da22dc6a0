// Laying values out as rank rows.
#include "place.hpp"

#include "check.hpp"

namespace manylora::test {

void test_place(Random& random) {
  const int64_t count = random.between(1, 6), length = random.between(1, 20), stride = random.between(1, 4);
  Block<uint16_t> source(((count - 1) * length + length - 1) * stride + 1);
  for (int64_t i = 0; i < source.size(); i++) source[i] = static_cast<uint16_t>(random.below(1 << 15));
  Block<uint8_t> image(count * length * 2 + 3);
  Block<int64_t> begin(count), strides(count), lengths(count), offset(count);
  for (int64_t row = 0; row < count; row++) {
    begin[row] = row * length * stride;
    strides[row] = stride;
    lengths[row] = length;
    offset[row] = 3 + (count - 1 - row) * length * 2;
  }
  place_rows(source.data(), image.data(), count, begin.data(), strides.data(), lengths.data(), offset.data());
  for (int64_t row = 0; row < count; row++)
    for (int64_t i = 0; i < length; i++) {
      uint16_t got;
      std::memcpy(&got, image.data() + offset[row] + i * 2, 2);
      expect(got == source[begin[row] + i * stride], "place_rows", "any");
    }
  for (int i = 0; i < 3; i++) expect(image[i] == 0xff, "place_rows writes nothing else", "any");
}

// Rows of eight bits: a scale and the nearest values. Sources of two and of four bytes hold the same numbers.
void test_round(Random& random) {
  const int64_t length = random.between(1, 40), stride = random.between(1, 4);
  const DType dtype = static_cast<DType>(random.below(3));
  Block<uint8_t> source(length * stride * bytes_of(dtype));
  std::vector<float> values;
  for (int64_t i = 0; i < length * stride; i++) values.push_back(put(random, dtype, source.data() + i * bytes_of(dtype)));
  Block<uint8_t> image(row_bytes(DType::kInt8, length) + 3);
  const int64_t begin = 0, offset = 3;
  const auto round = [&](auto* from) {
    round_rows(from, image.data(), 1, &begin, &stride, &length, &offset);
  };
  if (dtype == DType::kFloat32) round(reinterpret_cast<const float*>(source.data()));
  if (dtype == DType::kBFloat16) round(reinterpret_cast<const BFloat16*>(source.data()));
  if (dtype == DType::kHalf) round(reinterpret_cast<const Half*>(source.data()));
  float largest = 0, scale;
  for (int64_t i = 0; i < length; i++) largest = std::fmax(largest, std::fabs(values[i * stride]));
  std::memcpy(&scale, image.data() + offset, sizeof scale);
  expect(scale == largest / 127.0f, "round_rows: scale", "any");
  for (int64_t i = 0; i < length; i++) {
    const float got = scale * static_cast<float>(static_cast<int8_t>(image[offset + 4 + i]));
    expect(std::fabs(got - values[i * stride]) <= scale * 0.5001f, "round_rows: nearest", "any");
  }
  for (int i = 0; i < 3; i++) expect(image[i] == 0xff, "round_rows writes nothing else", "any");
}

}  // namespace manylora::test
