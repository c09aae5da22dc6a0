// Shrink and expand: ragged segments, rows in several of them, any rank, rank rows anywhere in a pool full of NaN.
#include <algorithm>

#include "check.hpp"

namespace manylora::test {
namespace {

// Rank rows [rank][width] of every segment, at random places of the pool, and their values.
struct Table {
  Block<uint8_t> pool;
  Block<int64_t> offset;
  Block<int32_t> begin, end;
  std::vector<std::vector<float>> values;  // of each rank row of all segments

  Table(Random& random, int64_t width, const std::vector<int32_t>& ranks, const std::vector<uint8_t>& dtypes)
      : pool(pool_bytes(width, ranks)), offset(total(ranks)), begin(ranks.size()), end(ranks.size()) {
    // Each row has a slot of its own; the slots are shuffled, and a row may end where its slot, or the pool, ends.
    const int64_t slot = width * 4 + 8;
    std::vector<int32_t> slots(total(ranks));
    for (size_t i = 0; i < slots.size(); i++) slots[i] = static_cast<int32_t>(i);
    random.shuffle(slots);
    int32_t next = 0;
    for (size_t s = 0; s < ranks.size(); s++) {
      const DType dtype = static_cast<DType>(dtypes[s]);
      begin[s] = next;
      for (int32_t r = 0; r < ranks[s]; r++, next++) {
        const int64_t room = slot - width * bytes_of(dtype);
        offset[next] = slots[next] * slot + random.between(0, room / bytes_of(dtype)) * bytes_of(dtype);
        values.emplace_back(width);
        for (int64_t i = 0; i < width; i++)
          values.back()[i] = put(random, dtype, pool.data() + offset[next] + i * bytes_of(dtype));
      }
      end[s] = next;
    }
  }

  static int64_t total(const std::vector<int32_t>& ranks) {
    int64_t sum = 0;
    for (int32_t rank : ranks) sum += rank;
    return sum;
  }
  static int64_t pool_bytes(int64_t width, const std::vector<int32_t>& ranks) { return total(ranks) * (width * 4 + 8); }
  RankRows rank_rows() const { return {pool.data(), offset.data(), begin.data(), end.data()}; }
};

}  // namespace

void test_lora(const Kernels& kernels, Random& random) {
  const int64_t num_segments = random.between(0, 5), num_rows = random.between(1, 40);
  const int64_t in = random.between(1, 80), out = random.between(1, 150), site_width = random.between(out, out + 40);
  std::vector<int32_t> ranks, rows, row_start = {0};
  std::vector<uint8_t> dtypes;
  for (int64_t s = 0; s < num_segments; s++) {
    ranks.push_back(static_cast<int32_t>(random.below(5) == 0 ? 0 : random.between(1, random.below(4) ? 9 : 129)));
    dtypes.push_back(static_cast<uint8_t>(random.below(3)));
    // Some empty, some longer than a task's share; a row may be named twice.
    for (int64_t e = random.below(4) ? random.below(7) : random.below(140); e > 0; e--)
      rows.push_back(static_cast<int32_t>(random.below(num_rows)));
    row_start.push_back(static_cast<int32_t>(rows.size()));
  }
  Block<int32_t> row_block(rows.size()), start_block(row_start.size());
  std::copy(rows.begin(), rows.end(), row_block.data());
  std::copy(row_start.begin(), row_start.end(), start_block.data());
  Block<uint8_t> dtype_block(dtypes.size());
  std::copy(dtypes.begin(), dtypes.end(), dtype_block.data());
  Block<float> weight(rows.size()), scaling(num_segments);
  random.fill(weight);
  random.fill(scaling);
  const Segments segments = {num_segments, row_block.data(), start_block.data(), weight.data(), dtype_block.data()};

  const Table a(random, in, ranks, dtypes), b(random, out, ranks, dtypes);
  Block<float> x(num_rows * in);
  random.fill(x);
  int64_t num_hidden = 0;
  Block<int64_t> h_begin(num_segments);
  Block<int32_t> h_stride(num_segments);
  for (int64_t s = 0; s < num_segments; s++) {
    h_begin[s] = num_hidden;
    h_stride[s] = ranks[s];
    num_hidden += static_cast<int64_t>(row_start[s + 1] - row_start[s]) * ranks[s];
  }
  Block<float> h(num_hidden);
  const int threads = static_cast<int>(random.between(1, 3));
  kernels.shrink({x.data(), in}, in, a.rank_rows(), segments, h.data(), threads);

  std::vector<double> want(num_rows * out, 0.0);
  std::vector<double> terms(num_rows, 1.0);  // of each row's sums in y, which is there before
  for (int64_t s = 0, at = 0; s < num_segments; s++)
    for (int32_t e = row_start[s]; e < row_start[s + 1]; e++) {
      terms[rows[e]] += ranks[s];
      for (int32_t r = 0; r < ranks[s]; r++, at++) {
        double sum = 0;
        for (int64_t i = 0; i < in; i++) sum += double(x[rows[e] * in + i]) * a.values[a.begin[s] + r][i];
        expect_near("shrink", kernels.isa, h[at], sum, std::sqrt(double(in)) * 4, double(in));
        for (int64_t o = 0; o < out; o++)
          want[rows[e] * out + o] += double(weight[e]) * scaling[s] * h[at] * b.values[b.begin[s] + r][o];
      }
    }

  // y is a column slice of something wider, whose other columns stay what they were; its last row ends with the slice.
  Block<float> y((num_rows - 1) * site_width + out);
  for (int64_t i = 0; i < y.size(); i++) y[i] = 1.0f;
  kernels.expand({y.data(), site_width}, out, b.rank_rows(), segments, {h_begin.data(), h_stride.data()}, h.data(),
                 scaling.data(), threads);
  double largest = 4;
  for (double value : want) largest = std::fmax(largest, std::fabs(value));
  for (int64_t t = 0; t < num_rows; t++)
    for (int64_t o = 0; o < site_width && t * site_width + o < y.size(); o++)
      if (o < out)
        expect_near("expand", kernels.isa, y[t * site_width + o], 1 + want[t * out + o], largest, terms[t]);
      else
        expect(y[t * site_width + o] == 1.0f, "expand leaves other columns alone", kernels.isa);
}

}  // namespace manylora::test
