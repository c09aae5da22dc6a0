// Fetching what a kernel reads next while it computes. Included by kernels.inl only.
#pragma once

#include <cstdint>

namespace manylora::MANYLORA_ISA {

// Memory that will be read next, fetched a few cache lines at a time. Left alone, the processor looks ahead within 4 KiB
// of one row after another; kernels read several rows side by side, and what comes after them lies anywhere.
class Ahead {
 public:
  static constexpr int64_t kLine = 64;

  Ahead() = default;

  // `count` rows whose beginnings are `stride` bytes apart, `bytes` of each.
  Ahead(const uint8_t* first, int64_t bytes, int64_t stride, int64_t count)
      : row_(first), bytes_(bytes), stride_(stride), left_(count) {
    if (bytes == stride) bytes_ = bytes * count, left_ = count > 0;
  }

  void spread_over(int64_t steps) {
    const int64_t lines = left_ * ((bytes_ + kLine - 1) / kLine);
    lines_a_step_ = steps > 0 ? (lines + steps - 1) / steps : 0;
  }

  // Called between vectors that are kept in registers, all of which a call would put into memory and take back.
  [[gnu::always_inline]] void step() {
    if (left_ == 0) return;
    const int64_t lines = (bytes_ - at_ + kLine - 1) / kLine < lines_a_step_ ? (bytes_ - at_ + kLine - 1) / kLine : lines_a_step_;
    for (int64_t i = 0; i < lines; i++) __builtin_prefetch(row_ + at_ + i * kLine, 0, 2);
    at_ += lines * kLine;
    if (at_ >= bytes_) {
      at_ = 0;
      row_ += stride_;
      left_--;
    }
  }

 private:
  const uint8_t* row_ = nullptr;
  int64_t bytes_ = 0, stride_ = 0, left_ = 0, at_ = 0, lines_a_step_ = 0;
};

}  // namespace manylora::MANYLORA_ISA
