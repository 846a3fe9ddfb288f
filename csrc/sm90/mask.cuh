// Dropout's mask of boxes in shared memory.
#pragma once

#include "../mask.cuh"
#include "../ptx/sync.cuh"
#include "fragments.cuh"
#include "params.cuh"
#include "warpgroup.cuh"

namespace fused_lora::sm90 {

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
      const uint32_t key = Mask::group_key(keys_[i], col / 8 + chunk_);
      v.x &= mask_.kept_bits(key, 0);
      v.y &= mask_.kept_bits(key, 1);
      v.z &= mask_.kept_bits(key, 2);
      v.w &= mask_.kept_bits(key, 3);
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
