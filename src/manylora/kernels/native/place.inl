// Lays values out as rank rows: one copy from how a file holds an adapter to how the kernels read it. Included by
// kernels.inl only.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "types.hpp"

namespace manylora::MANYLORA_ISA {

static inline float as_float(float value) { return value; }

static inline float as_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

static inline float as_float(Half value) {
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
static void round_row(const Value* from, int64_t num, uint8_t* image) {
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

// Values of `from`, `stride` apart; they are moved, not read, so a type of their size will do.
template <class Bits>
static void take_column(const Bits* from, int64_t stride, int64_t length, Bits* to) {
  for (int64_t i = 0; i < length; i++) to[i] = from[i * stride];
}

constexpr int kColumns = 8;

// kColumns columns that lie side by side become rows, `length` apart from one to the next.
template <class Bits>
static void take_columns(const Bits* from, int64_t stride, int64_t length, Bits* to) {
  int64_t i = 0;
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
  typedef Bits Eight __attribute__((vector_size(kColumns * sizeof(Bits))));
  for (; i + kColumns <= length; i += kColumns) {
    Eight block[kColumns];
    for (int k = 0; k < kColumns; k++) std::memcpy(&block[k], from + (i + k) * stride, sizeof(Eight));
    // Zipped three times, each row with the one four further on, rows are columns.
    for (int time = 0; time < 3; time++) {
      Eight zipped[kColumns];
      for (int k = 0; k < kColumns / 2; k++) {
        zipped[2 * k] = __builtin_shufflevector(block[k], block[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        zipped[2 * k + 1] = __builtin_shufflevector(block[k], block[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
      }
      std::copy(zipped, zipped + kColumns, block);
    }
    for (int k = 0; k < kColumns; k++) std::memcpy(to + k * length + i, &block[k], sizeof(Eight));
  }
#endif
#endif
  for (int k = 0; k < kColumns; k++) take_column(from + i * stride + k, stride, length - i, to + k * length + i);
}

// Calls work(row, values) for each row, with its values side by side.
template <class Bits, class Work>
static void for_each_placed(const Bits* source, const PlacedRows& rows, const Work& work) {
  static thread_local std::vector<Bits> beside;
  for (int64_t row = 0; row < rows.count;) {
    const int64_t stride = rows.stride[row], length = rows.length[row];
    const Bits* const from = source + rows.begin[row];
    if (stride == 1) {
      work(row++, from);
      continue;
    }
    int64_t count = 1;
    while (count < kColumns && row + count < rows.count && rows.begin[row + count] == rows.begin[row] + count &&
           rows.stride[row + count] == stride && rows.length[row + count] == length)
      count++;
    if (static_cast<int64_t>(beside.size()) < count * length) beside.resize(count * length);
    if (count == kColumns && stride >= kColumns) take_columns(from, stride, length, beside.data());
    else for (int64_t k = 0; k < count; k++) take_column(from + k, stride, length, beside.data() + k * length);
    for (int64_t k = 0; k < count; k++) work(row++, beside.data() + k * length);
  }
}

template <class Bits>
static void move_rows(const Bits* source, uint8_t* image, const PlacedRows& rows) {
  for_each_placed(source, rows, [&](int64_t row, const Bits* values) {
    std::memcpy(image + rows.offset[row], values, rows.length[row] * sizeof(Bits));
  });
}

static void place_rows(const void* source, DType dtype, uint8_t* image, PlacedRows rows) {
  if (bytes_of(dtype) == 2) move_rows(static_cast<const uint16_t*>(source), image, rows);
  else move_rows(static_cast<const uint32_t*>(source), image, rows);
}

static void round_rows(const void* source, DType dtype, uint8_t* image, PlacedRows rows) {
  const auto round_as = [&](const auto* bits, auto* type) {
    using Value = std::remove_pointer_t<decltype(type)>;
    for_each_placed(bits, rows, [&](int64_t row, const auto* values) {
      round_row(reinterpret_cast<const Value*>(values), rows.length[row], image + rows.offset[row]);
    });
  };
  const auto* const halves = static_cast<const uint16_t*>(source);
  if (dtype == DType::kFloat32) round_as(static_cast<const float*>(source), static_cast<float*>(nullptr));
  if (dtype == DType::kBFloat16) round_as(halves, static_cast<BFloat16*>(nullptr));
  if (dtype == DType::kHalf) round_as(halves, static_cast<Half*>(nullptr));
}

}  // namespace manylora::MANYLORA_ISA
