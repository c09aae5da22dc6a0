// All layers of a decoder in one call: the kernels that models/llama.py calls, in its order, on the same values, so with
// the same bits. What Python does between two kernels takes it tens of microseconds, because the activations have put it
// out of the caches meanwhile: an eighth of a step of a small model, and more with adapters.
#pragma once

#include <chrono>
#include <cstddef>
#include <vector>

#include "inside.hpp"
#include "types.hpp"

namespace manylora {

// A weight as native/tiles.py or native/int8.py lays it out.
struct Weight {
  const void* packed;
  const float* scale;
  const float* bias;
  int64_t parts;  // see TileWeight
};

struct DecoderLayer {
  const float *attention_norm, *mlp_norm;
  Weight qkv, o, gate_up, down;
};

struct DecoderShape {
  int64_t hidden, intermediate, num_heads, num_kv_heads, head_dim;
  float eps;
  bool in_tiles;
};

// Of one stack; it has no sites where no adapter of the step touches it.
struct StackOfStep {
  const int32_t *begin, *end;
  const Site* sites;
  int64_t num_sites;
};

// What the adapters of a step add to all stacks; four of them are a layer.
struct DecoderLora {
  const uint8_t* pages;
  const int64_t* offset;
  const StackOfStep* stacks;
  Segments segments;
  bool each_row_once;
};

// Where the rows of a step stand in their sequences, and where their keys and values go. The plane is the first layer's.
struct DecoderRows {
  int64_t count;
  const float *cos, *sin;
  KvPlane plane;
  Sequences sequences;
  const int64_t *slot_page, *slot_index;
  float attention_scale;
};

// For whoever wants to know what a step spends its time on.
struct DecoderSeconds {
  double products, lora, attention;  // the writing of keys and values is attention's
};

class DecoderRun {
 public:
  // lora: null for a step without adapters; seconds: added to, or null.
  DecoderRun(const Kernels& kernels, const DecoderShape& shape, const DecoderRows& rows, const DecoderLora* lora,
             DecoderSeconds* seconds, int threads)
      : kernels_(kernels), shape_(shape), rows_(rows), lora_(lora), seconds_(seconds), threads_(threads) {}

  // x [count, hidden] becomes the residual stream before the last MLP's part, which is `delta`.
  void layers(const DecoderLayer* layers, int64_t num_layers, Rows x, Rows delta) {
    const int64_t heads = shape_.num_heads * shape_.head_dim, kv = shape_.num_kv_heads * shape_.head_dim;
    static thread_local std::vector<Line> memory[5];
    const Rows normed = room(memory[0], shape_.hidden), qkv = room(memory[1], heads + 2 * kv),
               attended = room(memory[2], heads), gate_up = room(memory[3], 2 * shape_.intermediate),
               gated = room(memory[4], shape_.intermediate);
    const Rows keys = {qkv.data + heads, qkv.stride}, values = {keys.data + kv, qkv.stride};
    for (int64_t i = 0; i < num_layers; i++) {
      const DecoderLayer& layer = layers[i];
      kernels_.add_rms_norm(x, i == 0 ? Rows{nullptr, 0} : delta, normed, rows_.count, shape_.hidden,
                            layer.attention_norm, shape_.eps, threads_);
      product(layer.qkv, normed, shape_.hidden, qkv, heads + 2 * kv, 4 * i);
      kernels_.rotate(qkv, rows_.count, shape_.num_heads + shape_.num_kv_heads, shape_.head_dim, rows_.cos, rows_.sin,
                      threads_);
      timed(&DecoderSeconds::attention, [&] {
        kernels_.write_kv(keys, values, rows_.count, plane(i), rows_.slot_page, rows_.slot_index, threads_);
        kernels_.attend(qkv, attended, shape_.num_heads, plane(i), rows_.sequences, rows_.attention_scale, threads_);
      });
      product(layer.o, attended, heads, delta, shape_.hidden, 4 * i + 1);
      kernels_.add_rms_norm(x, delta, normed, rows_.count, shape_.hidden, layer.mlp_norm, shape_.eps, threads_);
      product(layer.gate_up, normed, shape_.hidden, gate_up, 2 * shape_.intermediate, 4 * i + 2);
      kernels_.silu_mul(gate_up, gated, rows_.count, shape_.intermediate, threads_);
      product(layer.down, gated, shape_.intermediate, delta, shape_.hidden, 4 * i + 3);
    }
  }

 private:
  // On the lines of the cache: what straddles two of them is loaded twice.
  struct alignas(64) Line {
    float values[16];
  };

  Rows room(std::vector<Line>& memory, int64_t width) const {
    const std::size_t lines = static_cast<std::size_t>((rows_.count * width + 15) / 16);
    if (memory.size() < lines) {
      memory.clear();  // nothing of it is to be copied
      memory.resize(lines);
    }
    return {memory.data()->values, width};
  }

  KvPlane plane(int64_t layer) const {
    KvPlane plane = rows_.plane;
    const int64_t bytes = 2 * layer * plane.page_tokens * plane.num_kv_heads * plane.head_dim * bytes_of(plane.dtype);
    plane.keys += bytes;
    plane.values += bytes;
    return plane;
  }

  // y = x W^T + b, and what the adapters add.
  void product(const Weight& weight, Rows x, int64_t inputs, Rows y, int64_t outputs, int64_t stack) const {
    timed(&DecoderSeconds::products, [&] {
      if (shape_.in_tiles)
        kernels_.tile_product(x, rows_.count, {weight.packed, weight.scale, weight.bias, weight.parts, outputs, inputs}, y,
                              threads_);
      else
        kernels_.int8_product(x, rows_.count,
                              {static_cast<const uint8_t*>(weight.packed), weight.scale, weight.bias, outputs, inputs},
                              y, threads_);
    });
    if (!lora_ || lora_->stacks[stack].num_sites == 0) return;
    timed(&DecoderSeconds::lora, [&] {
      const StackOfStep& its = lora_->stacks[stack];
      kernels_.lora(x, inputs, y, {lora_->pages, lora_->offset, its.begin, its.end}, its.sites, its.num_sites,
                    lora_->segments, lora_->each_row_once, threads_);
    });
  }

  template <class Work>
  void timed(double DecoderSeconds::*part, const Work& work) const {
    if (!seconds_) return work();
    const auto began = std::chrono::steady_clock::now();
    work();
    seconds_->*part += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }

  const Kernels& kernels_;
  const DecoderShape& shape_;
  const DecoderRows& rows_;
  const DecoderLora* const lora_;
  DecoderSeconds* const seconds_;
  const int threads_;
};

// Whether the rank rows of all stacks lie in their table and in the pool; inputs: of each stack.
inline bool are_inside(const DecoderLora& lora, int64_t num_stacks, const int64_t* inputs, int64_t num_offsets,
                       int64_t pool_bytes) {
  for (int64_t i = 0; i < num_stacks; i++) {
    const StackOfStep& its = lora.stacks[i];
    const RankRows a = {nullptr, lora.offset, its.begin, its.end};
    if (!is_inside(inputs[i], a, num_offsets, its.sites, its.num_sites, lora.segments, pool_bytes)) return false;
  }
  return true;
}

}  // namespace manylora
