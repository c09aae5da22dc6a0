// Paged attention, and the writing of keys and values, over pages in random order with NaN in all unused slots.
#include <algorithm>

#include "check.hpp"

namespace manylora::test {
namespace {

struct Shape {
  int64_t heads, kv_heads, head_dim, page_tokens;
};

// One layer's plane of a pool, the second of three; what is written is kept as double beside it.
struct Pool {
  int64_t plane_bytes, page_bytes;
  Block<uint8_t> bytes;
  KvPlane plane;

  Pool(const Shape& shape, int64_t num_pages, DType dtype)
      : plane_bytes(2 * shape.page_tokens * shape.kv_heads * shape.head_dim * bytes_of(dtype)),
        page_bytes(3 * plane_bytes),
        bytes(num_pages * page_bytes) {
    uint8_t* keys = bytes.data() + plane_bytes;
    plane = {keys, keys + plane_bytes / 2, page_bytes, shape.page_tokens, shape.kv_heads, shape.head_dim, dtype};
  }
};

void write(const Kernels& kernels, Random& random, const Shape& shape) {
  const DType dtype = random.below(2) ? DType::kFloat32 : DType::kBFloat16;
  const int64_t num_pages = random.between(1, 5), rows = random.between(1, num_pages * shape.page_tokens);
  const int64_t width = shape.kv_heads * shape.head_dim;
  const Pool pool(shape, num_pages, dtype);
  std::vector<int32_t> slots(num_pages * shape.page_tokens);
  for (size_t i = 0; i < slots.size(); i++) slots[i] = static_cast<int32_t>(i);
  random.shuffle(slots);
  Block<int64_t> page(rows), index(rows);
  for (int64_t t = 0; t < rows; t++) {
    page[t] = slots[t] / shape.page_tokens;
    index[t] = slots[t] % shape.page_tokens;
  }
  Block<float> k(rows * width), v(rows * width);
  // Values that bfloat16 holds exactly, so that what is read back must be equal.
  Block<uint8_t> spare(4);
  for (int64_t i = 0; i < k.size(); i++) {
    k[i] = put(random, DType::kFloat32, spare.data());
    v[i] = put(random, DType::kFloat32, spare.data());
  }
  kernels.write_kv({k.data(), width}, {v.data(), width}, rows, pool.plane, page.data(), index.data(),
                   static_cast<int>(random.between(1, 3)));
  for (int64_t t = 0; t < rows; t++)
    for (int64_t i = 0; i < width; i++) {
      const int64_t at = page[t] * pool.page_bytes + (index[t] * width + i) * bytes_of(dtype);
      for (const auto& [plane, from] : {std::pair{pool.plane.keys, &k}, std::pair{pool.plane.values, &v}}) {
        uint32_t bits = 0;
        std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 4 - bytes_of(dtype), plane + at, bytes_of(dtype));
        float got;
        std::memcpy(&got, &bits, 4);
        expect(got == (*from)[t * width + i], "write_kv", kernels.isa);
      }
    }
  int64_t poisoned = 0;
  for (int64_t i = 0; i < pool.bytes.size(); i++) poisoned += pool.bytes[i] == 0xff;
  expect(poisoned >= pool.bytes.size() - 2 * rows * width * bytes_of(dtype), "write_kv writes nothing else", kernels.isa);
}

}  // namespace

void test_attention(const Kernels& kernels, Random& random) {
  const int64_t kv_heads = random.between(1, 3);
  const Shape shape = {kv_heads * random.between(1, 5), kv_heads, random.between(1, 70), random.between(1, 9)};
  write(kernels, random, shape);
  const DType dtype = static_cast<DType>(random.below(3));
  const int64_t count = random.between(1, 4), width = shape.kv_heads * shape.head_dim;
  std::vector<int64_t> contexts, news;
  int64_t num_pages = 0, longest = 0, rows = 0;
  for (int64_t i = 0; i < count; i++) {
    contexts.push_back(random.between(1, random.below(3) ? 30 : 150));
    news.push_back(random.below(3) ? 1 : random.between(0, contexts[i]));
    const int64_t needed = (contexts[i] + shape.page_tokens - 1) / shape.page_tokens;
    num_pages += needed;
    longest = std::max(longest, needed);
    rows += news[i];
  }
  const Pool pool(shape, num_pages, dtype);
  std::vector<int32_t> free(num_pages);
  for (int64_t i = 0; i < num_pages; i++) free[i] = static_cast<int32_t>(i);
  random.shuffle(free);
  Block<int32_t> table(count * longest), query_start(count + 1), context_len(count);  // -1 beyond a sequence's pages
  query_start[0] = 0;
  std::vector<std::vector<double>> keys(count), values(count);
  for (int64_t i = 0, next = 0; i < count; i++) {
    query_start[i + 1] = query_start[i] + static_cast<int32_t>(news[i]);
    context_len[i] = static_cast<int32_t>(contexts[i]);
    for (int64_t t = 0; t < contexts[i]; t++) {
      if (t % shape.page_tokens == 0) table[i * longest + t / shape.page_tokens] = free[next++];
      const int64_t at = table[i * longest + t / shape.page_tokens] * pool.page_bytes +
                         t % shape.page_tokens * width * bytes_of(dtype);
      for (int64_t d = 0; d < width; d++) {
        keys[i].push_back(put(random, dtype, pool.plane.keys + at + d * bytes_of(dtype)));
        values[i].push_back(put(random, dtype, pool.plane.values + at + d * bytes_of(dtype)));
      }
    }
  }
  const int64_t q_width = shape.heads * shape.head_dim;
  Block<float> q(rows * q_width), out(rows * q_width);
  random.fill(q);
  const float scale = 0.3f;
  kernels.attend({q.data(), q_width}, {out.data(), q_width}, shape.heads, pool.plane,
                 {count, table.data(), longest, query_start.data(), context_len.data()}, scale,
                 static_cast<int>(random.between(1, 3)));

  for (int64_t i = 0; i < count; i++)
    for (int32_t t = query_start[i]; t < query_start[i + 1]; t++)
      for (int64_t head = 0; head < shape.heads; head++) {
        const int64_t visible = contexts[i] - (query_start[i + 1] - 1 - t);
        const int64_t column = head / (shape.heads / shape.kv_heads) * shape.head_dim;
        std::vector<double> weights;
        double most = -INFINITY, total = 0;
        for (int64_t c = 0; c < visible; c++) {
          double score = 0;
          for (int64_t d = 0; d < shape.head_dim; d++)
            score += q[t * q_width + head * shape.head_dim + d] * keys[i][c * width + column + d];
          weights.push_back(scale * score);
          most = std::fmax(most, weights.back());
        }
        for (double& weight : weights) total += weight = std::exp(weight - most);
        for (int64_t d = 0; d < shape.head_dim; d++) {
          double want = 0;
          for (int64_t c = 0; c < visible; c++) want += weights[c] / total * values[i][c * width + column + d];
          expect_near("attend", kernels.isa, out[t * q_width + head * shape.head_dim + d], want, 4,
                      double(visible + shape.head_dim));
        }
      }
}

}  // namespace manylora::test
