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

}  // namespace manylora::test
