// What the native tests share: exact memory, random numbers, and one way to say that two numbers differ.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "types.hpp"

namespace manylora::test {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Of its exact size on the heap, so that the sanitizer sees a read one element beyond it; NaN where T is float.
template <class T>
class Block {
 public:
  explicit Block(int64_t size) : size_(size), data_(new T[size]) {
    std::memset(static_cast<void*>(data_.get()), 0xff, size * sizeof(T));
  }
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(engine_); }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  void fill(const Block<float>& block) {
    for (int64_t i = 0; i < block.size(); i++) block[i] = normal();
  }
  void shuffle(std::vector<int32_t>& values) { std::shuffle(values.begin(), values.end(), engine_); }

 private:
  std::mt19937 engine_;
};

// A float cut to bfloat16, and back.
inline uint16_t upper_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}
inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A value of normal() in a dtype: its bytes at `to`, its value returned. Cut to eight bits of fraction, so that every
// dtype holds it exactly; for int8 a whole number, which the scale of its row is still to be multiplied with.
inline float put(Random& random, DType dtype, uint8_t* to) {
  float value = random.normal();
  if (dtype == DType::kInt8) {
    const int8_t whole = static_cast<int8_t>(random.between(-127, 127));
    std::memcpy(to, &whole, 1);
    return whole;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xffff0000;
  std::memcpy(&value, &bits, 4);
  if (dtype == DType::kFloat32) std::memcpy(to, &value, 4);
  if (dtype == DType::kBFloat16) std::memcpy(to, reinterpret_cast<const uint8_t*>(&bits) + 2, 2);
  if (dtype == DType::kHalf) {
    // Far below what a half resolves, a value is none: its exponent is out of range.
    if (std::fabs(value) < 0x1p-14f) bits = 0, value = 0;
    const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 15;
    const uint16_t half =
        bits == 0 ? 0 : static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(exponent << 10) |
                            static_cast<uint16_t>(bits >> 13 & 0x3ff);
    std::memcpy(to, &half, 2);
  }
  return value;
}

inline int64_t failures = 0;

// Whether `got` is a sum of `terms` products that was kept in float32.
inline bool near(double got, double want, double largest, double terms) {
  return std::fabs(got - want) <= 4 * 1.2e-7 * (std::sqrt(terms) + 1) * std::fmax(4.0, largest);
}

inline void expect_near(const char* what, const char* isa, double got, double want, double largest, double terms) {
  if (near(got, want, largest, terms)) return;
  if (failures++ < 20) std::printf("%s (%s): got %.9g, want %.9g\n", what, isa, got, want);
}

inline void expect(bool ok, const char* what, const char* isa) {
  if (ok) return;
  if (failures++ < 20) std::printf("%s (%s): not so\n", what, isa);
}

// One file each; every one runs random cases on the kernels of one instruction set.
void test_lora(const Kernels& kernels, Random& random);
void test_lora_at_once(const Kernels& kernels, Random& random);
void test_attention(const Kernels& kernels, Random& random);
void test_rows(const Kernels& kernels, Random& random);
void test_int8(const Kernels& kernels, Random& random);
void test_tiles(const Kernels& kernels, Random& random);
void test_decoder(const Kernels& kernels, Random& random);
void test_place(const Kernels& kernels, Random& random);
void test_round(const Kernels& kernels, Random& random);

}  // namespace manylora::test
