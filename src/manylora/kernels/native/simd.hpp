// Vectors of float, as wide as the instructions that the including file is compiled for. Included by kernels.inl only.
//
// Everything here lives in a namespace per instruction set: one binary holds the same kernels several times, and two
// functions of one name compiled for different instruction sets must never be taken for each other.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.hpp"

// Before a loop over an array of vectors: unrolled at once, the array becomes registers; else it is kept in memory.
#if defined(__clang__)
#define MANYLORA_UNROLL _Pragma("unroll")
#else
#define MANYLORA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace manylora::MANYLORA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));

static inline Vec broadcast(float value) { return value - Vec{}; }

// The value of kLanes stored elements, whatever their alignment.
static inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

static inline Vec load(const BFloat16* from) {
  VecH raw;
  std::memcpy(&raw, from, sizeof raw);
  // A bfloat16 is the upper half of the float of the same value.
  return (Vec)(__builtin_convertvector(raw, VecU) << 16);
}

static inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__) && defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VecH raw;
  std::memcpy(&raw, from, sizeof raw);
  const VecU bits = __builtin_convertvector(raw, VecU);
  const VecU magnitude = bits & 0x7fff;
  // Shifted into place the exponent is 112 too small; the product sets it right and makes subnormals normal.
  const VecU finite = (VecU)((Vec)(magnitude << 13) * 0x1p112f);
  const VecU special = (VecU)(magnitude >= 0x7c00) & 0x7f800000;
  return (Vec)(finite | special | (bits & 0x8000) << 16);
#endif
}

static inline Vec load(const int8_t* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Vec v;
  for (int i = 0; i < kLanes; i++) v[i] = from[i];
  return v;
#endif
}

// The first `count` < kLanes elements, zeros behind them; nothing behind them is read.
template <class T>
static inline Vec load_part(const T* from, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

static inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// Two vectors of neighbouring elements, in the order in which a type is quickest to load: see load_pair.
struct Pair {
  Vec first, second;
};

static inline Pair load_pair(const float* from) { return {load(from), load(from + kLanes)}; }
static inline Pair load_pair(const Half* from) { return {load(from), load(from + kLanes)}; }
static inline Pair load_pair(const int8_t* from) { return {load(from), load(from + kLanes)}; }

// Those at even places, then those at odd ones: a shift and a mask for what in order takes two conversions and two shifts.
static inline Pair load_pair(const BFloat16* from) {
  static_assert(std::endian::native == std::endian::little);
  VecU raw;
  std::memcpy(&raw, from, sizeof raw);
  return {(Vec)(raw << 16), (Vec)(raw & 0xffff0000u)};
}

// The first `count` elements of a pair, zeros behind them; nothing behind them is read.
template <class T>
static inline Pair load_pair_part(const T* from, int64_t count) {
  T padded[2 * kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load_pair(padded);
}

// A pair of floats in the order of load_pair for T.
template <class T>
static inline Pair arranged(Pair in_order) {
  return in_order;
}

template <>
inline Pair arranged<BFloat16>(Pair in_order) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {(Vec)_mm512_permutex2var_ps((__m512)in_order.first, even, (__m512)in_order.second),
          (Vec)_mm512_permutex2var_ps((__m512)in_order.first, odd, (__m512)in_order.second)};
#else
  float flat[2 * kLanes];
  store(flat, in_order.first);
  store(flat + kLanes, in_order.second);
  Pair result;
  for (int i = 0; i < kLanes; i++) {
    result.first[i] = flat[2 * i];
    result.second[i] = flat[2 * i + 1];
  }
  return result;
#endif
}

// The inverse: a pair in the order of load_pair for T, in the order of the elements.
template <class T>
static inline Pair in_order(Pair arranged) {
  return arranged;
}

template <>
inline Pair in_order<BFloat16>(Pair arranged) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {(Vec)_mm512_permutex2var_ps((__m512)arranged.first, low, (__m512)arranged.second),
          (Vec)_mm512_permutex2var_ps((__m512)arranged.first, high, (__m512)arranged.second)};
#else
  float flat[2 * kLanes];
  for (int i = 0; i < kLanes; i++) {
    flat[2 * i] = arranged.first[i];
    flat[2 * i + 1] = arranged.second[i];
  }
  return {load(flat), load(flat + kLanes)};
#endif
}

static inline void store_part(float* to, Vec v, int64_t count) { std::memcpy(to, &v, count * sizeof(float)); }

static inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                 // to nearest, ties to even
}

// The sums of four vectors' lanes. Four at once cost little more than one: each step halves the lanes of two vectors.
static inline void sum_four(const Vec v[4], float sums[4]) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
  _mm_storeu_ps(sums, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
  const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const __m256 abcd = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  _mm_storeu_ps(sums, _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1));
#else
  for (int i = 0; i < 4; i++) sums[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

// The same additions in the same order, so that a sum has the same bits whether it was taken alone or with three others.
static inline float sum(Vec v) {
  const Vec four[4] = {v, v, v, v};
  float sums[4];
  sum_four(four, sums);
  return sums[0];
}

static inline int32_t sum(VecI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t result = 0;
  for (int i = 0; i < kLanes; i++) result += v[i];
  return result;
#endif
}

static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

static inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float result = v[0];
  for (int i = 1; i < kLanes; i++) result = v[i] > result ? v[i] : result;
  return result;
#endif
}

// e^x to about two units in the last place; 0 and infinity are the nearest normal numbers, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series (the first term left out is below 6e-9).
static inline Vec exponential(Vec x) {
  x = x < -87.0f ? broadcast(-87.0f) : x;
  x = x > 88.0f ? broadcast(88.0f) : x;
  const Vec shifted = x * 1.44269504f + 0x1.8p23f;  // the sum's last bits are the nearest integer
  const Vec n = shifted - 0x1.8p23f;
  const Vec r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first exact in n * part
  Vec series = broadcast(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const VecU scale = ((VecU)shifted - 0x4b400000u + 127u) << 23;  // 2^n
  return series * (Vec)scale;
}

}  // namespace manylora::MANYLORA_ISA
