// Dropout's mask: of boxes of x in shared memory, and of what a tile's ranks add to its sums.
#pragma once

#include "../mask.cuh"
#include "../ptx/sync.cuh"
#include "fragments.cuh"
#include "params.cuh"
#include "warpgroup.cuh"

namespace fused_lora::sm90 {

// A warpgroup that masks boxes of x in shared memory: each thread has a 16-byte chunk in each of four rows.
// kOfRows: each row has a threshold of its own.
template <bool kOfRows = false>
class BoxMask {
 public:
  __device__ BoxMask(const Mask& mask, const Warpgroup& self) : mask_(mask), row_(self.thread() / kChunks), chunk_(self.thread() % kChunks) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) factors_[i] = Mask::factor(chunk_ % kChunksOfGroup * kPairs + i);
  }

  // Each lane makes one row's key, which is dear, and those who share the row get it from there.
  __device__ __forceinline__ void set_rows(int first_row) {
    const uint32_t own = mask_.row_key(row_of_lane(first_row));
#pragma unroll
    for (int i = 0; i < kRows; ++i) keys_[i] = from_lane_of(i, own);
  }

  // The same; the threshold is that of row_of_lane().
  __device__ __forceinline__ void set_rows(int first_row, uint32_t threshold) {
    set_rows(first_row);
#pragma unroll
    for (int i = 0; i < kRows; ++i) thresholds_[i] = from_lane_of(i, threshold);
  }

  __device__ __forceinline__ int row_of_lane(int first_row) const {
    const int lane = threadIdx.x % 32, first_of_warp = row_ - lane / kChunks;
    return first_row + first_of_warp + lane % kAtOnce + lane / kAtOnce % kRows * kStride;
  }

  // The box whose columns start at `col`, of the rows that were set.
  __device__ void apply(uint32_t box, int col) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row_ + i * kStride;
      const uint32_t address = box + swizzled(row, chunk_);
      uint4 v = ptx::load_shared(address);
      const uint32_t key = Mask::group_key(keys_[i], col / Mask::kGroup + chunk_ / kChunksOfGroup);
      v.x &= kept_bits(i, key, factors_[0]);
      v.y &= kept_bits(i, key, factors_[1]);
      v.z &= kept_bits(i, key, factors_[2]);
      v.w &= kept_bits(i, key, factors_[3]);
      ptx::store_shared(address, v);
    }
  }

 private:
  static constexpr int kRows = 4, kStride = kBox / kRows, kChunks = 8, kAtOnce = 32 / kChunks;  // rows of a warp
  static constexpr int kPairs = 4, kChunksOfGroup = Mask::kPairs / kPairs;  // of a chunk's columns

  static __device__ __forceinline__ uint32_t from_lane_of(int i, uint32_t value) {
    return __shfl_sync(~0u, value, i * kAtOnce + threadIdx.x % 32 / kChunks);
  }

  __device__ __forceinline__ uint32_t kept_bits(int i, uint32_t key, uint32_t factor) const {
    if constexpr (kOfRows) return Mask::kept_bits(key, factor, Mask::Picked(thresholds_[i]));
    return mask_.kept_bits(key, factor);
  }

  Mask mask_;
  int row_, chunk_;
  uint32_t keys_[kRows], factors_[kPairs], thresholds_[kOfRows ? kRows : 1];
};

// Which entries of x a tile's sums stand for were kept: a bit for each of a thread's. They are drawn in turns, so that others can
// multiply meanwhile.
template <int kBoxes, bool kOfRows = false>
class KeptBits {
 public:
  static constexpr int kDraws = 2 * kBoxes;  // half a box's each

  // Of the tile whose first ones of this warpgroup are (row, col).
  __device__ __forceinline__ KeptBits(const Mask& mask, int row, int col, const Warpgroup& self)
      : mask_(mask), keys_{mask.row_key(row + self.row()), mask.row_key(row + self.row() + 8)}, group_(col / Mask::kGroup) {
#pragma unroll
    for (int i = 0; i < 4; ++i) factors_[i] = Mask::factor(4 * i + self.col() / 2);
  }

  // By thresholds of a thread's two rows.
  __device__ __forceinline__ KeptBits(const Mask& mask, int row, int col, const Warpgroup& self, const uint32_t (&thresholds)[2])
      : KeptBits(mask, row, col, self) {
    thresholds_[0] = thresholds[0];
    thresholds_[kOfRows] = thresholds[1];
  }

  __device__ __forceinline__ void draw(int i) {
    static_assert(Mask::kGroup == kBox / 2);
    const uint32_t keys[2] = {Mask::group_key(keys_[0], group_ + i), Mask::group_key(keys_[1], group_ + i)};
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) bits |= kept_bits(k % 2, keys[k % 2], factors_[k / 2]) & 0x10001 << k;
    bits <<= i % 2 * 8;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) kept_[box] |= box == i / 2 ? bits : 0;
  }

  // A box's sums where they are kept.
  template <int kCount>
  __device__ __forceinline__ void add(float (&acc)[kCount], int box, const float (&more)[kBox / 2]) const {
#pragma unroll
    for (int i = 0; i < kBox / 2; ++i) {
      if (kept_[box] & 1u << (i / 2 + i % 2 * 16)) acc[box * kBox / 2 + i] += more[i];
    }
  }

 private:
  __device__ __forceinline__ uint32_t kept_bits(int i, uint32_t key, uint32_t factor) const {
    if constexpr (kOfRows) return Mask::kept_bits(key, factor, Mask::Picked(thresholds_[i]));
    return mask_.kept_bits(key, factor);
  }

  Mask mask_;
  uint32_t keys_[2], factors_[4], thresholds_[1 + kOfRows];
  int group_;
  uint32_t kept_[kBoxes] = {};  // of a pair of columns, the first one's bit and 16 above it the other's
};

}  // namespace fused_lora::sm90
