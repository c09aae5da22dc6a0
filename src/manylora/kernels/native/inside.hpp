// Whether what a call of `lora` is handed lies within itself and within the pool. Python says in words what does not.
#pragma once

#include "types.hpp"

namespace manylora {

// Rank rows first..last of a table of `num_offsets`, each `row_bytes` long, in a pool of `pool_bytes`.
inline bool are_inside(const int64_t* offset, int64_t num_offsets, int64_t first, int64_t last, int64_t row_bytes,
                       int64_t pool_bytes) {
  if (first < 0 || last < first || last > num_offsets) return false;
  for (int64_t r = first; r < last; r++)
    if (offset[r] < 0 || offset[r] > pool_bytes - row_bytes) return false;
  return true;
}

inline bool is_inside(int64_t width, const RankRows& a, int64_t num_offsets, const Site* sites, int64_t num_sites,
                      const Segments& segments, int64_t pool_bytes) {
  for (int64_t s = 0; s < segments.count; s++) {
    if (segments.row_dtype[s] > static_cast<uint8_t>(DType::kInt8)) return false;
    const DType dtype = static_cast<DType>(segments.row_dtype[s]);
    if (!are_inside(a.offset, num_offsets, a.begin[s], a.end[s], row_bytes(dtype, width), pool_bytes)) return false;
    for (int64_t i = 0; i < num_sites; i++) {
      const Site& site = sites[i];
      const int64_t bytes = row_bytes(dtype, site.width);
      if (!are_inside(a.offset, num_offsets, site.begin[s], site.end[s], bytes, pool_bytes)) return false;
      const int64_t last = static_cast<int64_t>(site.h_column[s]) + (site.end[s] - site.begin[s]);
      if (site.h_column[s] < 0 || last > a.end[s] - a.begin[s]) return false;
    }
  }
  return true;
}

}  // namespace manylora
