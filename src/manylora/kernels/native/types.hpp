// What the kernels are handed: raw pointers and sizes. Who owns the memory, and that it is large enough, is settled
// in Python (ops.py, native/decoder.py) before a call.
#pragma once

#include <cstdint>

namespace manylora {

// Two-byte floats as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Position in manylora.kernels.ROW_DTYPES. Keys and values are never kInt8.
enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kHalf = 2, kInt8 = 3 };

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2; }

// Bytes before the values of a rank row: one of eight bits begins with the float that its values are multiplied by.
constexpr int64_t scale_bytes(DType dtype) { return dtype == DType::kInt8 ? sizeof(float) : 0; }

constexpr int64_t row_bytes(DType dtype, int64_t width) { return scale_bytes(dtype) + width * bytes_of(dtype); }

// See manylora.kernels.Segments.
struct Segments {
  int64_t count;
  const int32_t* rows;
  const int32_t* row_start;
  const float* weight;
  const uint8_t* row_dtype;
};

// See manylora.kernels.RankRows, with the pool that its offsets count from.
struct RankRows {
  const uint8_t* pages;
  const int64_t* offset;
  const int32_t* begin;
  const int32_t* end;
};

// See manylora.kernels.PlacedRows: row i is `length[i]` values of a source, `stride[i]` apart from value `begin[i]` on, and
// goes to the bytes of an image from `offset[i]` on.
struct PlacedRows {
  int64_t count;
  const int64_t *begin, *stride, *length, *offset;
};

// One segment's share of h: `rank` values for each entry, `stride` apart from one entry to the next.
struct Hidden {
  const int64_t* begin;
  const int32_t* stride;
};

// See manylora.kernels.SiteRows: `width` columns of y from `column` on, the rank rows begin..end of each segment in the
// table of the stack, where they begin in an entry's h, and the scaling of each segment.
struct Site {
  int64_t column, width;
  const int32_t* begin;
  const int32_t* end;
  const int32_t* h_column;
  const float* scaling;
};

// One layer of manylora.kernels.KvLayout: token i of page p has its keys at p * page_bytes + i * token_bytes after
// `keys`, its values as far after `values`.
struct KvPlane {
  uint8_t* keys;
  uint8_t* values;
  int64_t page_bytes;
  int64_t page_tokens;
  int64_t num_kv_heads;
  int64_t head_dim;
  DType dtype;
};

// See manylora.kernels.PagedSequences.
struct Sequences {
  int64_t count;
  const int32_t* block_table;
  int64_t table_width;
  const int32_t* query_start;
  const int32_t* context_len;
};

// A matrix of floats whose rows are `stride` floats apart.
struct Rows {
  float* data;
  int64_t stride;
};

// A weight [outputs, inputs] as eight-bit integers, 128 for zero, with a scale per output; see int8.inl.
struct Int8Weight {
  const uint8_t* packed;
  const float* scale;
  const float* bias;  // or nullptr
  int64_t outputs, inputs;
};

// A weight [outputs, inputs] in tiles: as eight-bit integers if it has a scale per output, or as one or two bfloat16 that
// add up to each value, or as floats, whose parts are three; see tiles.inl.
struct TileWeight {
  const void* packed;
  const float* scale;  // or nullptr
  const float* bias;   // or nullptr
  int64_t parts, outputs, inputs;
};

// The kernels compiled for one instruction set.
struct Kernels {
  const char* isa;

  // h[entry] = x[row of entry] @ A^T, A [rank, width] the rank rows of the entry's segment; entry after entry.
  void (*shrink)(Rows x, int64_t width, RankRows a, Segments segments, float* h, int threads);

  // y[row of entry] += weight * scaling * h[entry] @ B, B the rank rows of the entry's segment. B [rank, width].
  void (*expand)(Rows y, int64_t width, RankRows b, Segments segments, Hidden hidden, const float* h,
                 const float* scaling, int threads);

  // Both at once for all sites of a stack, y[row] += ...; h is not kept. `a` are the rank rows of the whole stack, and its
  // table those of the sites too. `each_row_once`: no row has two entries.
  void (*lora)(Rows x, int64_t width, Rows y, RankRows a, const Site* sites, int64_t num_sites, Segments segments,
               bool each_row_once, int threads);

  // out[row] = softmax(scale * q[row] K^T) V, each row over its sequence up to and including itself.
  void (*attend)(Rows q, Rows out, int64_t num_heads, KvPlane plane, Sequences sequences, float scale, int threads);

  // Rotates channel i of each head with channel i + HD / 2, in place; x [T, H, HD], cos and sin [T, HD / 2].
  void (*rotate)(Rows x, int64_t num_rows, int64_t num_heads, int64_t head_dim, const float* cos, const float* sin,
                 int threads);

  // Stores the keys and values of new tokens, [T, KVH * HD] each, in their pages.
  void (*write_kv)(Rows k, Rows v, int64_t num_rows, KvPlane plane, const int64_t* slot_page, const int64_t* slot_index,
                   int threads);

  // x += delta (none where its data is nullptr), then y = x / rms(x) * weight.
  void (*add_rms_norm)(Rows x, Rows delta, Rows y, int64_t num_rows, int64_t width, const float* weight, float eps,
                       int threads);

  // The place of each row's largest value; -1 where it is not finite, or a value is NaN.
  void (*argmax)(Rows x, int64_t num_rows, int64_t width, int64_t* at, int threads);

  // y = silu(gate) * up for gate_up [T, 2 * width].
  void (*silu_mul)(Rows gate_up, Rows y, int64_t num_rows, int64_t width, int threads);

  // Rows of the source as they are.
  void (*place_rows)(const void* source, DType dtype, uint8_t* image, PlacedRows rows);

  // Rows of the source rounded to eight bits; each begins with its scale.
  void (*round_rows)(const void* source, DType dtype, uint8_t* image, PlacedRows rows);

  // y = x W^T + bias, each 32 inputs of a row of x rounded to 255 steps of their largest magnitude / 127.
  void (*int8_product)(Rows x, int64_t num_rows, Int8Weight weight, Rows y, int threads);

  // y = x W^T + bias; nullptr where the processor has no tiles.
  void (*tile_product)(Rows x, int64_t num_rows, TileWeight weight, Rows y, int threads);
};

extern const Kernels kPortableKernels;
#if defined(MANYLORA_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
#endif
#if defined(MANYLORA_AMX)
extern const Kernels kAmxKernels;
#endif

}  // namespace manylora
