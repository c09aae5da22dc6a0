// Lays values out as rank rows: one copy from how a file holds an adapter to how the kernels read it.
#pragma once

#include <cstdint>
#include <cstring>

namespace manylora {

// Row i: `length[i]` values of `source`, `stride[i]` apart from value `begin[i]` on, become bytes from `offset[i]` of
// `image` on. Values are moved, not read, so a type of their size will do.
template <class Value>
void place_rows(const Value* source, uint8_t* image, int64_t count, const int64_t* begin, const int64_t* stride,
                const int64_t* length, const int64_t* offset) {
  for (int64_t row = 0; row < count; row++) {
    const Value* from = source + begin[row];
    uint8_t* to = image + offset[row];
    if (stride[row] == 1) {
      std::memcpy(to, from, length[row] * sizeof(Value));
      continue;
    }
    for (int64_t i = 0; i < length[row]; i++)
      std::memcpy(to + i * sizeof(Value), from + i * stride[row], sizeof(Value));
  }
}

}  // namespace manylora
