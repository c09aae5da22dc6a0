// Lays values out as rank rows: one copy from how a file holds an adapter to how the kernels read it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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

// The same with values of eight bits: from `offset[i]` on stands the float that they are to be multiplied by, a 127th of
// the row's largest magnitude, and then the values, to the nearest. The scale of a row is NaN if a value is not finite.
template <class Value>
void round_rows(const Value* source, uint8_t* image, int64_t count, const int64_t* begin, const int64_t* stride,
                const int64_t* length, const int64_t* offset) {
  for (int64_t row = 0; row < count; row++) {
    const Value* from = source + begin[row];
    const int64_t step = stride[row], num = length[row];
    float largest = 0.0f;
    bool is_finite = true;
    for (int64_t i = 0; i < num; i++) {
      const float magnitude = std::fabs(as_float(from[i * step]));
      is_finite &= magnitude <= std::numeric_limits<float>::max();
      largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = is_finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    std::memcpy(image + offset[row], &scale, sizeof scale);
    int8_t* to = reinterpret_cast<int8_t*>(image + offset[row] + sizeof scale);
    if (!(scale > 0.0f)) {
      std::memset(to, 0, num);
      continue;
    }
    for (int64_t i = 0; i < num; i++) {
      // A scale that rounding made subnormal could leave a quotient above 127.
      const float quotient = std::nearbyint(as_float(from[i * step]) / scale);
      to[i] = static_cast<int8_t>(quotient > 127.0f ? 127.0f : quotient < -127.0f ? -127.0f : quotient);
    }
  }
}

}  // namespace manylora
