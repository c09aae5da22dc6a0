// Shrink and expand: ragged segments, rows in several of them, any rank, rank rows anywhere in a pool full of NaN.
#include <algorithm>

#include "check.hpp"

namespace manylora::test {
namespace {

using Ranks = std::vector<int32_t>;  // of each segment

int64_t total(const Ranks& ranks) {
  int64_t sum = 0;
  for (int32_t rank : ranks) sum += rank;
  return sum;
}

// A site of some width: rank rows [rank][width] of every segment.
struct Shape {
  int64_t width;
  Ranks ranks;
};

// The rank rows of several sites, at random places of a pool or one after the other, and their values.
struct Table {
  Block<uint8_t> pool;
  Block<int64_t> offset;
  std::vector<Block<int32_t>> begin, end;  // of each site
  std::vector<std::vector<float>> values;  // of each rank row of all sites

  Table(Random& random, const std::vector<Shape>& sites, const std::vector<uint8_t>& dtypes)
      : pool(num_rows(sites) * slot_of(sites)), offset(num_rows(sites)) {
    // Each row has a slot of its own; the slots are shuffled, and a row may end where its slot, or the pool, ends.
    const int64_t slot = slot_of(sites);
    const bool is_scattered = random.below(2);
    std::vector<int32_t> slots(offset.size());
    for (size_t i = 0; i < slots.size(); i++) slots[i] = static_cast<int32_t>(i);
    random.shuffle(slots);
    int32_t next = 0;
    int64_t at = 0;
    for (const auto& [width, ranks] : sites) {
      begin.emplace_back(ranks.size());
      end.emplace_back(ranks.size());
      for (size_t s = 0; s < ranks.size(); s++) {
        const DType dtype = static_cast<DType>(dtypes[s]);
        begin.back()[s] = next;
        if (!is_scattered) at += at % bytes_of(dtype);
        for (int32_t r = 0; r < ranks[s]; r++, next++) {
          const int64_t room = slot - row_bytes(dtype, width);
          offset[next] =
              is_scattered ? slots[next] * slot + random.between(0, room / bytes_of(dtype)) * bytes_of(dtype) : at;
          at += row_bytes(dtype, width);
          float scale = 1.0f;
          if (dtype == DType::kInt8) {
            scale = std::ldexp(1.0f, -static_cast<int>(random.between(5, 8)));  // a power of two, so that values are exact
            std::memcpy(pool.data() + offset[next], &scale, sizeof scale);
          }
          values.emplace_back(width);
          for (int64_t i = 0; i < width; i++) {
            uint8_t* to = pool.data() + offset[next] + scale_bytes(dtype) + i * bytes_of(dtype);
            values.back()[i] = put(random, dtype, to) * scale;
          }
        }
        end.back()[s] = next;
      }
    }
  }

  static int64_t num_rows(const std::vector<Shape>& sites) {
    int64_t sum = 0;
    for (const Shape& site : sites) sum += total(site.ranks);
    return sum;
  }
  static int64_t slot_of(const std::vector<Shape>& sites) {
    int64_t widest = 0;
    for (const Shape& site : sites) widest = std::max(widest, site.width);
    return widest * 4 + 8;
  }
  RankRows rank_rows(size_t site) const { return {pool.data(), offset.data(), begin[site].data(), end[site].data()}; }
};

// Rows of a batch in segments with a rank dtype and a weight each, as kernels are handed them.
struct Batch {
  Block<int32_t> rows, row_start;
  Block<float> weight;
  Block<uint8_t> dtype;

  Batch(Random& random, const std::vector<std::vector<int32_t>>& rows_of, const std::vector<uint8_t>& dtypes)
      : rows(count(rows_of)), row_start(rows_of.size() + 1), weight(count(rows_of)), dtype(dtypes.size()) {
    int32_t* to = rows.data();
    row_start[0] = 0;
    for (size_t s = 0; s < rows_of.size(); s++) {
      to = std::copy(rows_of[s].begin(), rows_of[s].end(), to);
      row_start[s + 1] = static_cast<int32_t>(to - rows.data());
      dtype[s] = dtypes[s];
    }
    random.fill(weight);
  }
  static int64_t count(const std::vector<std::vector<int32_t>>& rows_of) {
    int64_t sum = 0;
    for (const auto& one : rows_of) sum += static_cast<int64_t>(one.size());
    return sum;
  }
  Segments segments() const { return {dtype.size(), rows.data(), row_start.data(), weight.data(), dtype.data()}; }
};

int32_t random_rank(Random& random) {
  return static_cast<int32_t>(random.below(5) == 0 ? 0 : random.between(1, random.below(4) ? 9 : 129));
}

}  // namespace

void test_lora(const Kernels& kernels, Random& random) {
  const int64_t num_segments = random.between(0, 5), num_rows = random.between(1, 40);
  const int64_t in = random.between(1, 80), out = random.between(1, 150), site_width = random.between(out, out + 40);
  Ranks ranks;
  std::vector<uint8_t> dtypes;
  std::vector<std::vector<int32_t>> rows_of(num_segments);
  for (int64_t s = 0; s < num_segments; s++) {
    ranks.push_back(random_rank(random));
    dtypes.push_back(static_cast<uint8_t>(random.below(4)));
    // Some empty, some longer than a task's share; a row may be named twice.
    for (int64_t e = random.below(4) ? random.below(7) : random.below(140); e > 0; e--)
      rows_of[s].push_back(static_cast<int32_t>(random.below(num_rows)));
  }
  const Batch batch(random, rows_of, dtypes);
  const Segments segments = batch.segments();
  const auto& [rows, row_start, weight, dtype] = batch;
  Block<float> scaling(num_segments);
  random.fill(scaling);

  const Table table(random, {{in, ranks}, {out, ranks}}, dtypes);
  const RankRows a = table.rank_rows(0), b = table.rank_rows(1);
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
  kernels.shrink({x.data(), in}, in, a, segments, h.data(), threads);

  std::vector<double> want(num_rows * out, 0.0);
  std::vector<double> terms(num_rows, 1.0);  // of each row's sums in y, which is there before
  for (int64_t s = 0, at = 0; s < num_segments; s++)
    for (int32_t e = row_start[s]; e < row_start[s + 1]; e++) {
      terms[rows[e]] += ranks[s];
      for (int32_t r = 0; r < ranks[s]; r++, at++) {
        double sum = 0;
        for (int64_t i = 0; i < in; i++) sum += double(x[rows[e] * in + i]) * table.values[a.begin[s] + r][i];
        expect_near("shrink", kernels.isa, h[at], sum, std::sqrt(double(in)) * 4, double(in));
        for (int64_t o = 0; o < out; o++)
          want[rows[e] * out + o] += double(weight[e]) * scaling[s] * h[at] * table.values[b.begin[s] + r][o];
      }
    }

  // y is a column slice of something wider, whose other columns stay what they were; its last row ends with the slice.
  Block<float> y((num_rows - 1) * site_width + out);
  for (int64_t i = 0; i < y.size(); i++) y[i] = 1.0f;
  kernels.expand({y.data(), site_width}, out, b, segments, {h_begin.data(), h_stride.data()}, h.data(),
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

// Both at once for a stack of sites: the same bits as one after the other, whether threads share segments or columns.
void test_lora_at_once(const Kernels& kernels, Random& random) {
  const int64_t num_segments = random.between(1, 5), num_rows = 120, in = random.between(1, 80);
  const bool each_row_once = random.below(2);
  std::vector<int32_t> order(num_rows);
  for (int32_t i = 0; i < num_rows; i++) order[i] = i;
  random.shuffle(order);
  std::vector<uint8_t> dtypes;
  std::vector<std::vector<int32_t>> rows_of(num_segments);
  for (int64_t s = 0, row = 0; s < num_segments; s++) {
    dtypes.push_back(static_cast<uint8_t>(random.below(4)));
    for (int64_t e = random.below(3) ? random.below(7) : random.below(80); e > 0 && row < num_rows; e--, row++)
      rows_of[s].push_back(each_row_once ? order[row] : static_cast<int32_t>(random.below(num_rows)));
  }
  const Batch batch(random, rows_of, dtypes);
  const Segments segments = batch.segments();

  // The stack's own rank rows first, then each site's; a gap between the columns of two sites.
  const int64_t num_sites = random.between(1, 3);
  std::vector<Shape> shapes = {{in, Ranks(num_segments)}};
  std::vector<Block<int32_t>> h_columns;
  std::vector<Block<float>> scalings;
  for (int64_t i = 0; i < num_sites; i++) {
    Ranks ranks;
    h_columns.emplace_back(num_segments);
    scalings.emplace_back(num_segments);
    random.fill(scalings.back());
    for (int64_t s = 0; s < num_segments; s++) {
      ranks.push_back(random_rank(random));
      h_columns.back()[s] = shapes[0].ranks[s];
      shapes[0].ranks[s] += ranks[s];
    }
    shapes.push_back({random.between(1, 150), ranks});
  }
  const Table table(random, shapes, dtypes);
  std::vector<Site> sites;
  int64_t width = 0;
  for (int64_t i = 0; i < num_sites; i++) {
    width += random.below(3);
    const int64_t its = shapes[i + 1].width;
    sites.push_back({width, its, table.begin[i + 1].data(), table.end[i + 1].data(), h_columns[i].data(),
                     scalings[i].data()});
    width += its;
  }

  Block<float> x(num_rows * in), h(table.offset.size() * num_rows);
  random.fill(x);
  Block<int64_t> h_begin(num_segments);
  Block<int32_t> h_stride(num_segments);
  const int threads = static_cast<int>(random.between(1, 3));
  const RankRows a = table.rank_rows(0);
  Block<float> want(num_rows * width), y(num_rows * width);
  for (int64_t i = 0; i < y.size(); i++) y[i] = want[i] = 1.0f;
  kernels.shrink({x.data(), in}, in, a, segments, h.data(), threads);
  for (int64_t i = 0; i < num_sites; i++) {
    int64_t at = 0;
    for (int64_t s = 0; s < num_segments; s++) {
      h_begin[s] = at + h_columns[i][s];
      h_stride[s] = shapes[0].ranks[s];
      at += static_cast<int64_t>(rows_of[s].size()) * h_stride[s];
    }
    kernels.expand({want.data() + sites[i].column, width}, sites[i].width, table.rank_rows(i + 1), segments,
                   {h_begin.data(), h_stride.data()}, h.data(), scalings[i].data(), threads);
  }
  kernels.lora({x.data(), in}, in, {y.data(), width}, a, sites.data(), num_sites, segments, each_row_once, threads);
  for (int64_t i = 0; i < y.size(); i++) expect(y[i] == want[i], "lora has the bits of shrink and expand", kernels.isa);
}

}  // namespace manylora::test
