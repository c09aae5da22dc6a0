// Lays values out as rank rows: one copy from how a file holds an adapter to how the kernels read it.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "types.hpp"

namespace manylora {

// Row i: `length[i]` values of `source`, `stride[i]` apart from value `begin[i]` on, become bytes from `offset[i]` of
// `image` on. Values are moved, not read, so a type of their size will do.
template <class Value>
void place_rows(const Value* source, uint8_t* image, int64_t count, const int64_t* begin, const int64_t* stride,
                const int64_t* length, const int64_t* offset) {
  for (int64_t row = 0; row < count; row++) {
    const Value* from = source + begin[row];
    uint8_t* to = image + offset[row];
    if (stride[row] == 1) {
      std::memcpy(to, from, length[row] * sizeof(Value));
      continue;
    }
    for (int64_t i = 0; i < length[row]; i++)
      std::memcpy(to + i * sizeof(Value), from + i * stride[row], sizeof(Value));
  }
}

inline float as_float(float value) { return value; }

inline float as_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float as_float(Half value) {
  const uint32_t magnitude = value.bits & 0x7fff, sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t shifted = magnitude << 13;
  float result;
  std::memcpy(&result, &shifted, sizeof result);
  result *= 0x1p112f;  // the exponent is set right, and subnormals become normal
  uint32_t bits;
  std::memcpy(&bits, &result, sizeof bits);
  bits |= sign | (magnitude >= 0x7c00 ? 0x7f800000u : 0u);
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// One row of eight bits: the float that its values are to be multiplied by, a 127th of the largest magnitude, and then the
// values, to the nearest, ties to even. The scale is NaN if a value is not finite. Written so that compilers make vectors
// of it, for every processor: bits of magnitudes are compared as integers, and an addition rounds.
template <class Value>
void round_row(const Value* from, int64_t num, uint8_t* image) {
  int32_t largest = 0;
  for (int64_t i = 0; i < num; i++) {
    const int32_t magnitude = std::bit_cast<int32_t>(as_float(from[i])) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool is_finite = largest < 0x7f800000;
  const float scale =
      is_finite ? std::bit_cast<float>(largest) / 127.0f : std::numeric_limits<float>::quiet_NaN();
  std::memcpy(image, &scale, sizeof scale);
  int8_t* to = reinterpret_cast<int8_t*>(image + sizeof scale);
  if (!(scale > 0.0f)) {
    std::memset(to, 0, num);
    return;
  }
  constexpr float kOrigin = 0x1.8p23f;  // from here on floats are integers, and their bits count them
  for (int64_t i = 0; i < num; i++) {
    int32_t nearest = std::bit_cast<int32_t>(as_float(from[i]) / scale + kOrigin) - std::bit_cast<int32_t>(kOrigin);
    // A scale that rounding made subnormal could leave a quotient above 127.
    nearest = nearest > 127 ? 127 : nearest;
    to[i] = static_cast<int8_t>(nearest < -127 ? -127 : nearest);
  }
}

// As place_rows, with values of eight bits; each row begins with its scale.
template <class Value>
void round_rows(const Value* source, uint8_t* image, int64_t count, const int64_t* begin, const int64_t* stride,
                const int64_t* length, const int64_t* offset) {
  static thread_local std::vector<Value> side_by_side;
  for (int64_t row = 0; row < count; row++) {
    const Value* from = source + begin[row];
    if (stride[row] != 1) {
      if (static_cast<int64_t>(side_by_side.size()) < length[row]) side_by_side.resize(length[row]);
      for (int64_t i = 0; i < length[row]; i++) side_by_side[i] = from[i * stride[row]];
      from = side_by_side.data();
    }
    round_row(from, length[row], image + offset[row]);
  }
}

}  // namespace manylora
