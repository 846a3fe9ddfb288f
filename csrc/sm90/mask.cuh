// Dropout's mask where it is needed, never stored: a hash of (seed, row, column) of x, the same as in fused_lora/reference.py.
#pragma once

#include "../ptx/sync.cuh"
#include "fragments.cuh"
#include "params.cuh"
#include "warpgroup.cuh"

namespace fused_lora::sm90 {

class Mask {
 public:
  struct RowKey {
    uint32_t in, mid;
  };

  __device__ explicit Mask(const Dropout& dropout)
      : seed_low_(static_cast<uint32_t>(*dropout.seed)), seed_high_(*dropout.seed >> 32), threshold_(dropout.threshold) {}

  __device__ RowKey row_key(uint32_t row) const {
    const uint32_t in = mix(mix(row ^ seed_low_) + seed_high_);
    return {in, mix(in + kGolden) * kSecond};
  }

  __device__ bool keeps(RowKey key, uint32_t col) const {
    uint32_t h = key.in ^ col * kGolden;
    h = (h ^ h >> 16) * kFirst;
    h = (h ^ h >> 15) * kSecond + key.mid;
    return (h ^ h >> 16) >= threshold_;
  }

  // Of two neighbouring 16-bit entries, the bits that stay.
  __device__ uint32_t kept_bits(RowKey key, uint32_t col) const {
    return (keeps(key, col) ? 0xFFFFu : 0) | (keeps(key, col + 1) ? 0xFFFF0000u : 0);
  }

 private:
  static constexpr uint32_t kGolden = 0x9E3779B9, kFirst = 0x7FEB352D, kSecond = 0x846CA68B;

  static __device__ uint32_t mix(uint32_t h) {
    h = (h ^ h >> 16) * kFirst;
    h = (h ^ h >> 15) * kSecond;
    return h ^ h >> 16;
  }

  uint32_t seed_low_, seed_high_, threshold_;
};

// A warpgroup that masks boxes of x in shared memory: each thread has a 16-byte chunk in each of four rows.
class BoxMask {
 public:
  __device__ BoxMask(const Mask& mask, const Warpgroup& self) : mask_(mask), row_(self.thread() / 8), chunk_(self.thread() % 8) {}

  __device__ void set_rows(int first_row) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) keys_[i] = mask_.row_key(first_row + row_ + i * kStride);
  }

  // The box whose columns start at `col`, of the rows that were set.
  __device__ void apply(uint32_t box, int col) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row_ + i * kStride;
      const uint32_t address = box + swizzled(row, chunk_);
      uint4 v = ptx::load_shared(address);
      const uint32_t first = col + chunk_ * 8;
      v.x &= mask_.kept_bits(keys_[i], first);
      v.y &= mask_.kept_bits(keys_[i], first + 2);
      v.z &= mask_.kept_bits(keys_[i], first + 4);
      v.w &= mask_.kept_bits(keys_[i], first + 6);
      ptx::store_shared(address, v);
    }
  }

 private:
  static constexpr int kRows = 4, kStride = kBox / kRows;

  Mask mask_;
  int row_, chunk_;
  Mask::RowKey keys_[kRows];
};

}  // namespace fused_lora::sm90
