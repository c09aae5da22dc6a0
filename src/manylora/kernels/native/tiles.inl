// The base product in tiles of bfloat16, which AMX multiplies and adds up in float32 many times as fast as vectors of
// floats are multiplied. Included by kernels.inl only.
//
// A float is the sum of three bfloat16, to its last bit but for what is below 2^-133. Of the nine products of two such
// sums six are computed; the other three are below 2^-24 of the whole, as is the rounding of a product of floats (Henry,
// Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations").
// A weight of eight bits is a bfloat16 as it is; for it, two parts of x will do: they leave out less than 2^-16.
// Many a weight is the sum of fewer to begin with, since checkpoints are seldom kept in float32: of bfloat16 one is
// enough, of half precision two. Such parts lie in memory as they are multiplied, and what would be zero is left out.
//
// A row's sums run over the inputs in order, whatever else is in the batch, so its bits are the same in any.
// Weights are packed by native/tiles.py: for each strip of kStrip outputs and each kStep inputs two tiles of 16 outputs.
// A tile has, for each input i of the first sixteen, those of the 16 outputs and then those of input i + 16; where parts
// are stored, those two beside each other for each output, and the tiles of a strip and step part after part.
#pragma once

#include <utility>
#include <vector>

#include "ahead.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace manylora::MANYLORA_ISA {

#if defined(__AMX_BF16__)

constexpr int kStep = 32;          // inputs that one instruction multiplies
constexpr int kTile = 16 * kStep;  // values in a tile

// A task multiplies all rows with some strips, which share the rows that are read, and takes some steps of them apart at
// a time.
struct Blocks {
  int64_t strips, steps;
};

// How a weight lies in memory; how many bfloat16 a value of x, and of the weight, is taken apart into; and the largest
// block of weights that is multiplied with all rows before the next. As measured: a few rows do not pay for parts that
// leave the first cache meanwhile.
struct Floats {
  using Value = float;
  static constexpr int kX = 3, kW = 3;
  static constexpr bool kStored = false;
  static constexpr Blocks most(int64_t num_rows) { return num_rows <= 48 ? Blocks{1, 2} : Blocks{4, 4}; }
};
struct Integers {
  using Value = int8_t;
  static constexpr int kX = 2, kW = 1;
  static constexpr bool kStored = false;
  static constexpr Blocks most(int64_t) { return {4, 18}; }
};
template <int kParts>
struct StoredParts {
  using Value = uint16_t;
  static constexpr int kX = 3, kW = kParts;
  static constexpr bool kStored = true;
  static constexpr Blocks most(int64_t num_rows) { return num_rows <= 48 ? Blocks{4, 4} : Blocks{6, 4}; }
};

struct alignas(64) Line {
  uint16_t values[32];
};

// Room for at least `count` values, on the lines of the cache: what straddles two of them is loaded twice.
static uint16_t* room_for(std::vector<Line>& memory, int64_t count) {
  const size_t lines = static_cast<size_t>(count + 31) / 32;
  if (memory.size() < lines) memory.resize(lines);
  return memory.data()->values;
}

// The upper halves of 32 floats, value i beside value i + 16, as tiles have them.
static inline __m512i upper_halves(__m512i first, __m512i second) {
  return _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, _mm512_set1_epi32(0xffff0000)));
}

static inline __m512 cut(__m512i value) { return (__m512)_mm512_and_si512(value, _mm512_set1_epi32(0xffff0000)); }

// 32 values of x as the sum of kParts bfloat16 each; the parts of all of them lie a tile apart. Rounded to the nearest, so
// that what is left out is as often below as above.
template <int kParts>
static inline void split_x(__m512 first, __m512 second, uint16_t* to) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  MANYLORA_UNROLL for (int part = 0; part < kParts; part++) {
    const __m512i nearest_first = _mm512_add_epi32((__m512i)first, half);
    const __m512i nearest_second = _mm512_add_epi32((__m512i)second, half);
    _mm512_store_si512(to + part * kTile, upper_halves(nearest_first, nearest_second));
    first -= cut(nearest_first);
    second -= cut(nearest_second);
  }
}

// Up to sixteen rows of x, all their inputs: step after step, part after part, a tile of 32 inputs of each row.
template <int kParts>
static void split_rows(Rows x, int64_t first, int64_t count, int64_t inputs, uint16_t* to) {
  for (int64_t at = 0; at < inputs; at += kStep, to += kParts * kTile)
    for (int64_t row = 0; row < count; row++) {
      const float* from = x.data + (first + row) * x.stride + at;
      const int64_t left = inputs - at;
      const Vec low = left >= 16 ? load(from) : load_part(from, left);
      const Vec high = left >= 32 ? load(from + 16) : left > 16 ? load_part(from + 16, left - 16) : Vec{};
      split_x<kParts>(low, high, to + row * kStep);
    }
}

// 32 weights as they are packed; the parts of all of them lie two tiles apart. Cut, not rounded: that takes fewer
// instructions.
static inline void split_weights(const float* w, uint16_t* to) {
  __m512 first = load(w), second = load(w + 16);
  MANYLORA_UNROLL for (int part = 0; part < 3; part++) {
    _mm512_store_si512(to + part * 2 * kTile, upper_halves((__m512i)first, (__m512i)second));
    first -= cut((__m512i)first);
    second -= cut((__m512i)second);
  }
}

static inline void split_weights(const int8_t* w, uint16_t* to) {
  const auto widen = [](const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  };
  _mm512_store_si512(to, upper_halves(widen(w), widen(w + 16)));
}

// Takes the weights of a block apart, a few at a time: while the block before is multiplied, since tiles leave the units
// of vectors idle, and memory too. Weights whose parts are stored are only fetched.
template <class W>
class Splitter {
 public:
  using Value = typename W::Value;
  static constexpr int64_t kStepParts = W::kW * 2 * kTile;  // of a strip

  Splitter() = default;

  // `strip_size`: weights from one strip to the next.
  Splitter(const Value* first, int64_t strip_size, Blocks block, uint16_t* to)
      : from_(first), to_(to), strip_size_(strip_size), strips_(block.strips), groups_(block.steps * kGroups) {}

  void spread_over(int64_t calls) { groups_a_call_ = (strips_ * groups_ + calls - 1) / calls; }

  void some() {
    for (int64_t i = 0; i < groups_a_call_ && strips_ > 0; i++) group();
  }

  void rest() {
    while (strips_ > 0) group();
  }

 private:
  static constexpr int64_t kGroups = 2 * kTile / 32;  // of a step
  static constexpr int64_t kAhead = 2048;             // bytes; the strip goes on for as long, nearly always

  void group() {
    const Value* const from = from_ + at_ * 32;
    for (int64_t byte = 0; byte < 32 * static_cast<int64_t>(sizeof(Value)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(from) + kAhead + byte, 0, 2);
    split_weights(from, to_ + at_ / kGroups * kStepParts + at_ % kGroups * 32);
    if (++at_ < groups_) return;
    at_ = 0;
    from_ += strip_size_;
    to_ += groups_ / kGroups * kStepParts;
    strips_--;
  }

  const Value* from_ = nullptr;
  uint16_t* to_ = nullptr;
  int64_t strip_size_ = 0, strips_ = 0, groups_ = 0, at_ = 0, groups_a_call_ = 0;
};

template <int kParts>
class Splitter<StoredParts<kParts>> {
 public:
  static constexpr int64_t kStepParts = kParts * 2 * kTile;

  Splitter() = default;

  Splitter(const uint16_t* first, int64_t strip_size, Blocks block, uint16_t*)
      : ahead_(reinterpret_cast<const uint8_t*>(first), block.steps * kStepParts * static_cast<int64_t>(sizeof(uint16_t)),
               strip_size * static_cast<int64_t>(sizeof(uint16_t)), block.strips) {}

  void spread_over(int64_t calls) { ahead_.spread_over(calls); }
  void some() { ahead_.step(); }
  void rest() {}

 private:
  Ahead ahead_;
};

// Tiles 0 to 3 are sums: of 16 rows and 16 outputs, of these rows and the next outputs, of the next rows and both.
// Tiles 4 and 5 are rows, 6 and 7 weights.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

static void begin_tiles(int rows, int next_rows) {
  const uint8_t next = static_cast<uint8_t>(next_rows ? next_rows : 16), these = static_cast<uint8_t>(rows);
  const TileShapes shapes = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {these, these, next, next, these, next, 16, 16}};
  asm volatile("" ::"r"(&shapes) : "memory");  // GCC does not know that tiles and their shapes are loaded from memory
  _tile_loadconfig(&shapes);
}

template <bool kTwo>
static inline void load_rows(const uint16_t* rows, const uint16_t* next_rows) {
  _tile_loadd(4, rows, 64);
  if constexpr (kTwo) _tile_loadd(5, next_rows, 64);
}

static inline void load_weights(const uint16_t* w) {
  _tile_loadd(6, w, 64);
  _tile_loadd(7, w + kTile, 64);
}

template <bool kTwo>
static inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// to [rows, kStrip] = from + x @ w over some steps; no `from` stands for zeros. What comes next is taken apart, or fetched,
// a little after each part: as much at once would keep tiles from being loaded.
template <class W, bool kTwo>
static void multiply_block(const uint16_t* x, int64_t next_rows, const uint16_t* w, int64_t steps, const float* from,
                           Rows to, Splitter<W>& next) {
  if (from) {
    constexpr int64_t kStride = kStrip * sizeof(float);
    _tile_loadd(0, from, kStride);
    _tile_loadd(1, from + 16, kStride);
    if constexpr (kTwo) {
      _tile_loadd(2, from + 16 * kStrip, kStride);
      _tile_loadd(3, from + 16 * kStrip + 16, kStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t step = 0; step < steps; step++, x += W::kX * kTile, w += W::kW * 2 * kTile) {
    const auto take_x = [&](int part) { load_rows<kTwo>(x + part * kTile, x + next_rows + part * kTile); };
    const auto take_w = [&](int part) { load_weights(w + part * 2 * kTile); };
    const auto multiply = [&] {
      multiply_tiles<kTwo>();
      next.some();
    };
    take_w(0);
    for (int part = W::kX - 1; part >= 0; part--) {
      take_x(part);
      multiply();
    }
    if constexpr (W::kW == 3) {
      take_w(2);
      multiply();
    }
    if constexpr (W::kW >= 2) {
      take_w(1);
      multiply();
      take_x(1);
      multiply();
    }
  }
  const int64_t stride = to.stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, to.data, stride);
  _tile_stored(1, to.data + 16, stride);
  if constexpr (kTwo) {
    _tile_stored(2, to.data + 16 * to.stride, stride);
    _tile_stored(3, to.data + 16 * to.stride + 16, stride);
  }
}

// How often multiply_block multiplies tiles in a step.
template <class W>
constexpr int64_t kProducts = W::kX + (W::kW == 3 ? 3 : W::kW == 2 ? 2 : 0);

// As many strips to a task, up to `most`, as leave the threads alike to do.
static int64_t strips_of_task(int64_t strips, int64_t most, int threads) {
  int64_t best = 1, least = strips;
  for (int64_t each = 1; each <= most; each++) {
    const int64_t tasks = (strips + each - 1) / each, longest = (tasks + threads - 1) / threads * each;
    if (longest <= least) best = each, least = longest;
  }
  return best;
}

// y = scale * sums + bias for some rows and the outputs of a strip.
static void finish(const float* sums, const TileWeight& weight, int64_t strip, Rows y, int64_t num_rows) {
  const int64_t first = strip * kStrip, left = weight.outputs - first, width = left < kStrip ? left : kStrip;
  float scale[kStrip], bias[kStrip] = {};
  for (int64_t o = 0; o < width; o++) scale[o] = weight.scale ? weight.scale[first + o] : 1.0f;
  for (int64_t o = 0; o < width && weight.bias; o++) bias[o] = weight.bias[first + o];
  for (int64_t t = 0; t < num_rows; t++, sums += kStrip) {
    float* const to = y.data + t * y.stride + first;
    if (width == kStrip)
      MANYLORA_UNROLL for (int64_t o = 0; o < kStrip; o += kLanes)
        store(to + o, load(sums + o) * load(scale + o) + load(bias + o));
    else
      for (int64_t o = 0; o < width; o++) to[o] = sums[o] * scale[o] + bias[o];
  }
}

template <class W>
static void tile_product_of(Rows x, int64_t num_rows, const TileWeight& weight, Rows y, int threads) {
  const int64_t steps = (weight.inputs + kStep - 1) / kStep, strips = (weight.outputs + kStrip - 1) / kStrip;
  const int64_t row_tiles = (num_rows + 15) / 16, x_tile = steps * W::kX * kTile;
  const Blocks most = W::most(num_rows);
  const int64_t each = strips_of_task(strips, most.strips, threads), tasks = (strips + each - 1) / each;

  // What a thread keeps from one task to the next. The parts of x are each thread's own: shared, every line of them
  // would go from one core to the others and back for each product.
  struct Own {
    uint16_t *x, *w[2];  // parts of x; of the weights that are multiplied, and of those that come next
    float* sums;
    bool begun;  // w[0] is what the task begins with
  };
  const auto begin = [=] {
    static thread_local std::vector<Line> x_memory, w_memory, sum_memory;
    Own own = {room_for(x_memory, row_tiles * x_tile), {},
               reinterpret_cast<float*>(room_for(sum_memory, 2 * each * row_tiles * 16 * kStrip)), false};
    if constexpr (!W::kStored) {
      const int64_t block = most.strips * most.steps * Splitter<W>::kStepParts;
      own.w[0] = room_for(w_memory, 2 * block);
      own.w[1] = own.w[0] + block;
    }
    for (int64_t tile = 0; tile < row_tiles; tile++) {
      const int64_t left = num_rows - tile * 16;
      split_rows<W::kX>(x, tile * 16, left < 16 ? left : 16, weight.inputs, own.x + tile * x_tile);
    }
    return own;
  };

  const auto size_of = [=](int64_t task, int64_t step) -> Blocks {
    const int64_t first = task * each;
    return {first + each < strips ? each : strips - first, step + most.steps < steps ? most.steps : steps - step};
  };
  using Value = typename W::Value;
  constexpr int64_t kStepSize = 2 * kTile * (W::kStored ? W::kW : 1);  // of a strip, as it lies in memory
  const auto weights_at = [=](int64_t task, int64_t step) {
    return static_cast<const Value*>(weight.packed) + (task * each * steps + step) * kStepSize;
  };
  const auto splitter = [=](int64_t task, int64_t step, uint16_t* to) {
    return Splitter<W>(weights_at(task, step), steps * kStepSize, size_of(task, step), to);
  };
  parallel_for_with_next(tasks, threads, begin, [=](Own& own, int64_t task, int64_t next_task) {
    if (!own.begun) splitter(task, 0, own.w[0]).rest();
    const int64_t sums_size = row_tiles * 16 * kStrip;
    int rows = -1, next_rows = -1;  // that the tiles have
    for (int64_t step = 0; step < steps; step += most.steps) {
      const Blocks now = size_of(task, step);
      Splitter<W> next;
      if (step + now.steps < steps)
        next = splitter(task, step + now.steps, own.w[1]);
      else if (next_task < tasks)
        next = splitter(next_task, 0, own.w[1]);
      const uint16_t* parts = own.w[0];
      int64_t strip_parts = now.steps * Splitter<W>::kStepParts;
      if constexpr (W::kStored) parts = weights_at(task, step), strip_parts = steps * kStepSize;
      next.spread_over((row_tiles + 1) / 2 * now.strips * now.steps * kProducts<W>);
      const bool ends = step + now.steps == steps;
      for (int64_t t = 0; t < row_tiles; t += 2) {
        const int64_t left = num_rows - t * 16;
        const int these = static_cast<int>(left < 16 ? left : 16);
        const int those = static_cast<int>(left < 16 ? 0 : left < 32 ? left - 16 : 16);
        if (these != rows || those != next_rows) begin_tiles(rows = these, next_rows = those);
        const auto multiply = those ? multiply_block<W, true> : multiply_block<W, false>;
        for (int64_t s = 0; s < now.strips; s++) {
          const int64_t strip = task * each + s;
          float* const sums = own.sums + s * sums_size + t * 16 * kStrip;
          const Rows of_y = {y.data + t * 16 * y.stride, y.stride};
          // Rows are written as soon as they are there, while tiles go on: at the end, all at once, memory is waited for.
          const bool is_whole = !weight.scale && !weight.bias && (strip + 1) * kStrip <= weight.outputs;
          multiply(own.x + t * x_tile + step * W::kX * kTile, x_tile, parts + s * strip_parts, now.steps,
                   step ? sums : nullptr, ends && is_whole ? Rows{of_y.data + strip * kStrip, y.stride} : Rows{sums, kStrip},
                   next);
          if (!ends || is_whole) continue;
          asm volatile("" ::: "memory");  // GCC does not know that tiles are stored there
          finish(sums, weight, strip, of_y, these + those);
        }
      }
      next.rest();
      std::swap(own.w[0], own.w[1]);
      asm volatile("" ::: "memory");  // what was taken apart is in memory before tiles are loaded from there
    }
    own.begun = next_task < tasks;
    _tile_release();
  });
}

static void tile_product(Rows x, int64_t num_rows, TileWeight weight, Rows y, int threads) {
  if (num_rows == 0) return;
  const auto product = weight.scale        ? tile_product_of<Integers>
                       : weight.parts == 1 ? tile_product_of<StoredParts<1>>
                       : weight.parts == 2 ? tile_product_of<StoredParts<2>>
                                           : tile_product_of<Floats>;
  product(x, num_rows, weight, y, threads);
}

#else

constexpr auto tile_product = nullptr;

#endif

}  // namespace manylora::MANYLORA_ISA
