// Backward with dropout: what a tile's ranks add to its sums, where the mask keeps it.
#pragma once

#include "../mask.cuh"
#include "product.cuh"

namespace fused_lora::sm80 {

// Of a product's rows of x and columns, a bit for each of this thread's sums.
template <typename P>
class KeptSums {
 public:
  __device__ __forceinline__ explicit KeptSums(Sums& sums) : sums_(sums) {}

  // From (row, col) on.
  __device__ __forceinline__ void draw(const Mask& mask, int row, int col) {
    const int lane = threadIdx.x % 32;
    static_assert(P::kRows == 4, "two rows a lane");
    const Mask::RowKey keys[2] = {mask.row_key(row + lane), mask.row_key(row + 32 + lane)};
#pragma unroll
    for (int i = 0; i < 2 * P::kRows; ++i) {
      const Mask::RowKey key = Mask::of_lane(keys[i / 4], i % 4 * 8 + lane / 4);
      if (i % 2 == 0) kept_[i / 2] = 0;
#pragma unroll
      for (int j = 0; j < 2 * P::kCols; ++j) {
        kept_[i / 2] |= mask.kept_bits(Mask::group_key(key, col / 8 + j), lane % 4) & 0x10001 << bit(i % 2, j);
      }
    }
  }

  // Adds those of 16 rows, i, and 8 kCount columns.
  template <int kCount>
  __device__ __forceinline__ void add(int i, int first, const float (&more)[kCount][4]) const {
    const uint32_t kept = ptx::opaque(kept_[i]);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float(&own)[4] = P::of(sums_, i, first + j);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (kept & 1u << (bit(k / 2, first + j) + k % 2 * 16)) own[k] += more[j][k];
      }
    }
  }

 private:
  // Of the first of a pair of columns; the other one's is 16 higher.
  static __device__ constexpr int bit(int eighth, int j) { return eighth * 8 + j; }

  Sums& sums_;
  uint32_t kept_[P::kRows];
};

// Its products over a step are added where they are kept. They and their fragments are some of the step's: more has no room beside
// the sums.
template <typename P>
struct MaskedProduct : P {
  using P::P;
  static constexpr int kSlices = kDepth / 16, kAtOnce = P::kCols / 2;  // of the right operand's fragments

  __device__ void read(int, int) {}

  // Columns from 16 first on.
  __device__ __forceinline__ void multiply_columns(const KeptSums<P>& into, int first) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int j = first; j < first + kAtOnce; ++j) P::read_right(slice, slice, j);
    }
#pragma unroll
    for (int i = 0; i < P::kRows; ++i) {
      float more[2 * kAtOnce][4] = {};
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        P::read_left(slice, slice, i);
#pragma unroll
        for (int j = 0; j < 2 * kAtOnce; ++j) P::multiply_one(more[j], i, 2 * first + j, slice);
      }
      into.add(i, 2 * first, more);
    }
  }
};

}  // namespace fused_lora::sm80
