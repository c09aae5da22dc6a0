// The Python module: addresses in, nothing out. Arguments are what native/__init__.py passes; it knows the tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "inside.hpp"
#include "isas.hpp"

namespace nb = nanobind;

namespace manylora {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const Kernels* active = supported().front();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->isa);
  return names;
}

void use_isa(const std::string& name) {
  for (const Kernels* kernels : supported())
    if (name == kernels->isa) {
      active = kernels;
      return;
    }
  throw std::invalid_argument("this processor has no instruction set " + name);
}

Segments segments_at(int64_t count, Address rows, Address row_start, Address weight, Address row_dtype) {
  return {count, at<const int32_t>(rows), at<const int32_t>(row_start), at<const float>(weight),
          at<const uint8_t>(row_dtype)};
}

RankRows rank_rows_at(Address pages, Address offset, Address begin, Address end) {
  return {at<const uint8_t>(pages), at<const int64_t>(offset), at<const int32_t>(begin), at<const int32_t>(end)};
}

KvPlane plane_at(Address keys, Address values, int64_t page_bytes, int64_t page_tokens, int64_t num_kv_heads,
                 int64_t head_dim, int dtype) {
  return {at<uint8_t>(keys), at<uint8_t>(values), page_bytes, page_tokens, num_kv_heads, head_dim,
          static_cast<DType>(dtype)};
}

static_assert(sizeof(Site) == 6 * sizeof(int64_t), "native/__init__.py writes a site as six integers of 64 bits");
static_assert(sizeof(DecoderLayer) == 18 * sizeof(int64_t), "native/decoder.py writes a layer as eighteen");
static_assert(sizeof(DecoderSeconds) == 3 * sizeof(double), "run_layers is handed three");
static_assert(sizeof(StackOfStep) == 4 * sizeof(int64_t), "and a stack as four");

}  // namespace

NB_MODULE(_core, m) {
  using A = Address;
  using I = int64_t;
  const auto free_gil = nb::call_guard<nb::gil_scoped_release>();

  m.def("isas", &isas);
  m.def("isa", [] { return std::string(active->isa); });
  m.def("use_isa", &use_isa);
  m.def(
      "shrink",
      [](A x, I x_stride, I width, A pages, A offset, A begin, A end, I num_segments, A rows, A row_start, A weight,
         A row_dtype, A h, int threads) {
        active->shrink({at<float>(x), x_stride}, width, rank_rows_at(pages, offset, begin, end),
                       segments_at(num_segments, rows, row_start, weight, row_dtype), at<float>(h), threads);
      },
      free_gil);
  m.def(
      "expand",
      [](A y, I y_stride, I width, A pages, A offset, A begin, A end, I num_segments, A rows, A row_start, A weight,
         A row_dtype, A h_begin, A h_stride, A h, A scaling, int threads) {
        active->expand({at<float>(y), y_stride}, width, rank_rows_at(pages, offset, begin, end),
                       segments_at(num_segments, rows, row_start, weight, row_dtype),
                       {at<const int64_t>(h_begin), at<const int32_t>(h_stride)}, at<const float>(h),
                       at<const float>(scaling), threads);
      },
      free_gil);
  m.def(
      "lora",
      [](A x, I x_stride, I width, A y, I y_stride, A pages, A offset, A begin, A end, A sites, I num_sites,
         I num_segments, A rows, A row_start, A weight, A row_dtype, bool each_row_once, int threads) {
        active->lora({at<float>(x), x_stride}, width, {at<float>(y), y_stride},
                     rank_rows_at(pages, offset, begin, end), at<const Site>(sites), num_sites,
                     segments_at(num_segments, rows, row_start, weight, row_dtype), each_row_once, threads);
      },
      free_gil);
  m.def("is_inside", [](I width, A offset, A begin, A end, A sites, I num_sites, I num_segments, A rows, A row_start,
                        A weight, A row_dtype, I num_offsets, I pool_bytes) {
    return is_inside(width, rank_rows_at(0, offset, begin, end), num_offsets, at<const Site>(sites), num_sites,
                     segments_at(num_segments, rows, row_start, weight, row_dtype), pool_bytes);
  });
  m.def(
      "attend",
      [](A q, I q_stride, A out, I out_stride, I num_heads, A keys, A values, I page_bytes, I page_tokens,
         I num_kv_heads, I head_dim, int dtype, I num_sequences, A block_table, I table_width, A query_start,
         A context_len, float scale, int threads) {
        active->attend({at<float>(q), q_stride}, {at<float>(out), out_stride}, num_heads,
                       plane_at(keys, values, page_bytes, page_tokens, num_kv_heads, head_dim, dtype),
                       {num_sequences, at<const int32_t>(block_table), table_width, at<const int32_t>(query_start),
                        at<const int32_t>(context_len)},
                       scale, threads);
      },
      free_gil);
  m.def(
      "rotate",
      [](A x, I stride, I num_rows, I num_heads, I head_dim, A cos, A sin, int threads) {
        active->rotate({at<float>(x), stride}, num_rows, num_heads, head_dim, at<const float>(cos),
                       at<const float>(sin), threads);
      },
      free_gil);
  m.def(
      "write_kv",
      [](A k, I k_stride, A v, I v_stride, I num_rows, A keys, A values, I page_bytes, I page_tokens, I num_kv_heads,
         I head_dim, int dtype, A slot_page, A slot_index, int threads) {
        active->write_kv({at<float>(k), k_stride}, {at<float>(v), v_stride}, num_rows,
                         plane_at(keys, values, page_bytes, page_tokens, num_kv_heads, head_dim, dtype),
                         at<const int64_t>(slot_page), at<const int64_t>(slot_index), threads);
      },
      free_gil);
  m.def(
      "add_rms_norm",
      [](A x, I x_stride, A delta, I delta_stride, A y, I y_stride, I num_rows, I width, A weight, float eps,
         int threads) {
        active->add_rms_norm({at<float>(x), x_stride}, {at<float>(delta), delta_stride}, {at<float>(y), y_stride},
                             num_rows, width, at<const float>(weight), eps, threads);
      },
      free_gil);
  m.def(
      "argmax",
      [](A x, I stride, I num_rows, I width, A at_rows, int threads) {
        active->argmax({at<float>(x), stride}, num_rows, width, at<int64_t>(at_rows), threads);
      },
      free_gil);
  m.def(
      "silu_mul",
      [](A gate_up, I gate_up_stride, A y, I y_stride, I num_rows, I width, int threads) {
        active->silu_mul({at<float>(gate_up), gate_up_stride}, {at<float>(y), y_stride}, num_rows, width, threads);
      },
      free_gil);
  for (const auto& [name, work] : {std::pair("place_rows", &Kernels::place_rows), {"round_rows", &Kernels::round_rows}})
    m.def(
        name,
        [work](A source, int dtype, A image, I count, A begin, A stride, A length, A offset) {
          (active->*work)(at<const void>(source), static_cast<DType>(dtype), at<uint8_t>(image),
                          {count, at<const int64_t>(begin), at<const int64_t>(stride), at<const int64_t>(length),
                           at<const int64_t>(offset)});
        },
        free_gil);
  m.def(
      "int8_product",
      [](A x, I x_stride, I num_rows, A packed, A scale, A bias, I outputs, I inputs, A y, I y_stride,
         int threads) {
        active->int8_product({at<float>(x), x_stride}, num_rows,
                             {at<const uint8_t>(packed), at<const float>(scale), at<const float>(bias), outputs,
                              inputs},
                             {at<float>(y), y_stride}, threads);
      },
      free_gil);
  m.def(
      "tile_product",
      [tile_product = supported().front()->tile_product](A x, I x_stride, I num_rows, A packed, A scale, A bias,
                                                         I parts, I outputs, I inputs, A y, I y_stride, int threads) {
        if (!tile_product) throw std::runtime_error("this processor has no tiles");
        tile_product({at<float>(x), x_stride}, num_rows,
                     {at<const void>(packed), at<const float>(scale), at<const float>(bias), parts, outputs, inputs},
                     {at<float>(y), y_stride}, threads);
      },
      free_gil);
  m.def(
      "run_layers",
      [tile_product = supported().front()->tile_product](
         A layers, I num_layers, I hidden, I intermediate, I num_heads, I num_kv_heads, I head_dim, float eps,
         bool in_tiles, A x, A delta, I num_rows, A cos, A sin, A keys, A values, I page_bytes, I page_tokens,
         int kv_dtype, I num_sequences, A block_table, I table_width, A query_start, A context_len, A slot_page,
         A slot_index, float scale, A pages, A offset, A stacks, I num_segments, A rows, A row_start, A weight,
         A row_dtype, bool each_row_once, A seconds, int threads) {
        Kernels kernels = *active;
        kernels.tile_product = tile_product;
        const DecoderShape shape = {hidden, intermediate, num_heads, num_kv_heads, head_dim, eps, in_tiles};
        const DecoderRows of_step = {
            num_rows, at<const float>(cos), at<const float>(sin),
            plane_at(keys, values, page_bytes, page_tokens, num_kv_heads, head_dim, kv_dtype),
            {num_sequences, at<const int32_t>(block_table), table_width, at<const int32_t>(query_start),
             at<const int32_t>(context_len)},
            at<const int64_t>(slot_page), at<const int64_t>(slot_index), scale};
        const DecoderLora lora = {at<const uint8_t>(pages), at<const int64_t>(offset), at<const StackOfStep>(stacks),
                                  segments_at(num_segments, rows, row_start, weight, row_dtype), each_row_once};
        DecoderRun(kernels, shape, of_step, stacks ? &lora : nullptr, at<DecoderSeconds>(seconds), threads)
            .layers(at<const DecoderLayer>(layers), num_layers, {at<float>(x), hidden}, {at<float>(delta), hidden});
      },
      free_gil);
  m.def("are_stacks_inside", [](A offset, A stacks, I num_segments, A rows, A row_start, A weight, A row_dtype,
                                I num_stacks, A inputs, I num_offsets, I pool_bytes) {
    const DecoderLora lora = {nullptr, at<const int64_t>(offset), at<const StackOfStep>(stacks),
                              segments_at(num_segments, rows, row_start, weight, row_dtype), false};
    return are_inside(lora, num_stacks, at<const int64_t>(inputs), num_offsets, pool_bytes);
  });
}

}  // namespace manylora
