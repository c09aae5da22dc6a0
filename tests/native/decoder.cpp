// All layers in one call: the bits of the kernels called one by one, each into memory of its exact size.
#include "decoder.hpp"

#include "check.hpp"

namespace manylora::test {
namespace {

// A weight of random values; its layout does not matter here.
struct RandomWeight {
  Block<float> floats, scale, bias;
  Block<uint8_t> bytes;
  Block<uint16_t> parts;  // of the floats, one each
  bool stores_parts;

  RandomWeight(Random& random, int64_t outputs, int64_t inputs)
      : floats(up(outputs, 32) * up(inputs, 32)), scale(up(outputs, 32)), bias(outputs), bytes(floats.size()),
        parts(floats.size()), stores_parts(random.below(2)) {
    for (const Block<float>* block : {&floats, &scale, &bias}) random.fill(*block);
    for (int64_t i = 0; i < floats.size(); i++) floats[i] /= static_cast<float>(inputs);
    for (int64_t i = 0; i < scale.size(); i++) scale[i] /= static_cast<float>(100 * inputs);
    for (int64_t i = 0; i < parts.size(); i++) parts[i] = upper_half(floats[i]);
    for (int64_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<uint8_t>(random.between(1, 255));
  }
  static int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
  Weight weight(bool in_tiles) const {
    if (!in_tiles) return {bytes.data(), scale.data(), bias.data(), 0};
    if (stores_parts) return {parts.data(), nullptr, bias.data(), 1};
    return {floats.data(), nullptr, bias.data(), 0};
  }
};

}  // namespace

void test_decoder(const Kernels& kernels, Random& random) {
  const bool in_tiles = kernels.tile_product && random.below(2);
  const int64_t num_layers = random.between(1, 3), kv_heads = random.between(1, 2), heads = kv_heads * random.between(1, 2);
  const int64_t head_dim = 8 * random.between(1, 3), hidden = random.between(5, 50), inner = random.between(5, 60);
  const DecoderShape shape = {hidden, inner, heads, kv_heads, head_dim, 1e-5f, in_tiles};
  const int64_t q = heads * head_dim, kv = kv_heads * head_dim, qkv = q + 2 * kv;
  const int threads = static_cast<int>(random.between(1, 3));

  // One sequence of `rows` new tokens, on pages of four.
  const int64_t rows = random.between(1, 20), page_tokens = 4, num_pages = (rows + 3) / 4;
  const int64_t page_bytes = num_layers * 2 * page_tokens * kv * 4;
  Block<uint8_t> pages(num_pages * page_bytes), want_pages(num_pages * page_bytes);
  Block<int32_t> block_table(num_pages), query_start(2), context_len(1);
  Block<int64_t> slot_page(rows), slot_index(rows);
  for (int32_t i = 0; i < num_pages; i++) block_table[i] = static_cast<int32_t>(num_pages) - 1 - i;
  query_start[0] = 0;
  query_start[1] = context_len[0] = static_cast<int32_t>(rows);
  for (int64_t i = 0; i < rows; i++) slot_page[i] = block_table[i / 4], slot_index[i] = i % 4;
  Block<float> cos(rows * head_dim / 2), sin(rows * head_dim / 2), x(rows * hidden), want_x(rows * hidden);
  for (const Block<float>* block : {&cos, &sin, &x}) random.fill(*block);
  std::memcpy(want_x.data(), x.data(), x.size() * sizeof(float));
  const auto plane_in = [&](const Block<uint8_t>& pool, int64_t layer) -> KvPlane {
    uint8_t* const keys = pool.data() + 2 * layer * page_tokens * kv * 4;
    return {keys, keys + page_tokens * kv * 4, page_bytes, page_tokens, kv_heads, head_dim, DType::kFloat32};
  };
  const Sequences sequences = {1, block_table.data(), num_pages, query_start.data(), context_len.data()};

  std::vector<RandomWeight> weights;
  std::vector<Block<float>> norms;
  for (int64_t i = 0; i < num_layers; i++) {
    weights.emplace_back(random, qkv, hidden);
    weights.emplace_back(random, hidden, q);
    weights.emplace_back(random, 2 * inner, hidden);
    weights.emplace_back(random, hidden, inner);
    for (int k = 0; k < 2; k++) {
      norms.emplace_back(hidden);
      random.fill(norms.back());
    }
  }
  std::vector<DecoderLayer> layers;
  for (int64_t i = 0; i < num_layers; i++)
    layers.push_back({norms[2 * i].data(), norms[2 * i + 1].data(), weights[4 * i].weight(in_tiles),
                      weights[4 * i + 1].weight(in_tiles), weights[4 * i + 2].weight(in_tiles),
                      weights[4 * i + 3].weight(in_tiles)});

  // An adapter of rank 2 that some rows have, the same rank rows in all its stacks; the last one has none of its own.
  const int64_t widest = std::max({qkv, hidden, 2 * inner, q, inner});
  Block<uint8_t> pool(4 * widest * 4);
  for (int64_t i = 0; i < 4 * widest; i++) put(random, DType::kFloat32, pool.data() + 4 * i);
  Block<int64_t> offset(4);
  for (int64_t i = 0; i < 4; i++) offset[i] = i * widest * 4;
  Block<int32_t> bounds(4), entry_rows(rows), row_start(2);
  for (int32_t i = 0; i < 4; i++) bounds[i] = i == 0 ? 0 : i == 3 ? 0 : 2 * i;  // 0, 2, 4 and a column of h
  Block<float> entry_weight(rows), scaling(1);
  random.fill(entry_weight);
  random.fill(scaling);
  Block<uint8_t> dtype(1);
  dtype[0] = static_cast<uint8_t>(DType::kFloat32);
  for (int32_t i = 0; i < rows; i++) entry_rows[i] = i;
  row_start[0] = 0;
  row_start[1] = static_cast<int32_t>(random.between(0, rows));
  const int64_t widths[] = {qkv, hidden, 2 * inner, hidden}, inputs_of[] = {hidden, q, hidden, inner};
  std::vector<Site> sites;
  std::vector<int64_t> inputs;
  for (int64_t k = 0; k < 4 * num_layers; k++) {
    sites.push_back({0, widths[k % 4], &bounds[1], &bounds[2], &bounds[3], scaling.data()});
    inputs.push_back(inputs_of[k % 4]);
  }
  std::vector<StackOfStep> stacks;
  for (int64_t k = 0; k < 4 * num_layers; k++)
    stacks.push_back({&bounds[0], &bounds[1], &sites[k], k + 1 < 4 * num_layers ? 1 : 0});
  const DecoderLora lora = {pool.data(), offset.data(), stacks.data(),
                            {1, entry_rows.data(), row_start.data(), entry_weight.data(), dtype.data()}, true};
  const bool with_lora = random.below(2);
  expect(are_inside(lora, 4 * num_layers, inputs.data(), 4, pool.size()), "rank rows are inside", kernels.isa);
  expect(!are_inside(lora, 4 * num_layers, inputs.data(), 4, pool.size() - widest * 4), "and then are not", kernels.isa);

  Block<float> delta(rows * hidden), want(rows * hidden);
  for (const Block<float>* block : {&delta, &want}) std::memset(block->data(), 0, block->size() * sizeof(float));
  for (const Block<uint8_t>* pool_of : {&pages, &want_pages}) std::memset(pool_of->data(), 0, pool_of->size());
  const DecoderRows of_step = {rows, cos.data(), sin.data(), plane_in(pages, 0), sequences, slot_page.data(),
                               slot_index.data(), 0.25f};
  DecoderSeconds seconds = {0, 0, 0};
  const bool is_timed = random.below(2);
  DecoderRun(kernels, shape, of_step, with_lora ? &lora : nullptr, is_timed ? &seconds : nullptr, threads)
      .layers(layers.data(), num_layers, {x.data(), hidden}, {delta.data(), hidden});
  expect((seconds.products > 0) == is_timed && (seconds.attention > 0) == is_timed, "seconds are told", kernels.isa);
  expect(seconds.lora == 0 || (is_timed && with_lora), "of LoRA where there is some", kernels.isa);

  const auto product = [&](int64_t k, const Block<float>& from, const Block<float>& to) {
    const int64_t in = inputs[k], out = widths[k % 4];
    const Weight weight = weights[k].weight(in_tiles);
    if (in_tiles)
      kernels.tile_product({from.data(), in}, rows, {weight.packed, nullptr, weight.bias, weight.parts, out, in},
                           {to.data(), out}, threads);
    else
      kernels.int8_product({from.data(), in}, rows,
                           {static_cast<const uint8_t*>(weight.packed), weight.scale, weight.bias, out, in},
                           {to.data(), out}, threads);
    if (with_lora && stacks[k].num_sites)
      kernels.lora({from.data(), in}, in, {to.data(), out}, {pool.data(), offset.data(), &bounds[0], &bounds[1]},
                   &sites[k], 1, lora.segments, true, threads);
  };
  for (int64_t i = 0; i < num_layers; i++) {
    Block<float> normed(rows * hidden), heads_of(rows * qkv), attended(rows * q), gate_up(rows * 2 * inner),
        gated(rows * inner);
    // A kernel that does nothing, as when failures are to be found, must leave numbers for those after it.
    for (const Block<float>* block : {&normed, &heads_of, &attended, &gate_up, &gated})
      std::memset(block->data(), 0, block->size() * sizeof(float));
    const KvPlane plane = plane_in(want_pages, i);
    kernels.add_rms_norm({want_x.data(), hidden}, {i ? want.data() : nullptr, hidden}, {normed.data(), hidden}, rows,
                         hidden, norms[2 * i].data(), 1e-5f, threads);
    product(4 * i, normed, heads_of);
    kernels.rotate({heads_of.data(), qkv}, rows, heads + kv_heads, head_dim, cos.data(), sin.data(), threads);
    kernels.write_kv({heads_of.data() + q, qkv}, {heads_of.data() + q + kv, qkv}, rows, plane, slot_page.data(),
                     slot_index.data(), threads);
    kernels.attend({heads_of.data(), qkv}, {attended.data(), q}, heads, plane, sequences, 0.25f, threads);
    product(4 * i + 1, attended, want);
    kernels.add_rms_norm({want_x.data(), hidden}, {want.data(), hidden}, {normed.data(), hidden}, rows, hidden,
                         norms[2 * i + 1].data(), 1e-5f, threads);
    product(4 * i + 2, normed, gate_up);
    kernels.silu_mul({gate_up.data(), 2 * inner}, {gated.data(), inner}, rows, inner, threads);
    product(4 * i + 3, gated, want);
  }
  for (int64_t i = 0; i < want.size(); i++) {
    expect(delta[i] == want[i], "all layers in one call: what is left to add", kernels.isa);
    expect(x[i] == want_x[i], "all layers in one call: the residual stream", kernels.isa);
  }
  expect(std::memcmp(pages.data(), want_pages.data(), pages.size()) == 0, "all layers in one call: the pool", kernels.isa);
}

}  // namespace manylora::test
