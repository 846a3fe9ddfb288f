// Backward with dropout: what a tile's ranks add to its sums, where the mask keeps it.
#pragma once

#include "../mask.cuh"
#include "product.cuh"

namespace fused_lora::sm80 {

// Of a product's rows of x and columns, a bit for each of this thread's sums. They are drawn in turns, beside products.
template <typename P>
class KeptSums {
 public:
  static constexpr int kDraws = 2 * P::kRows;  // of 8 rows

  // From (row, col) on.
  __device__ __forceinline__ KeptSums(Sums& sums, const Dropout& dropout, int row, int col)
      : sums_(sums), mask_(dropout), group_(col / Mask::kGroup) {
    static_assert(P::kRows == 4, "two rows a lane");
#pragma unroll
    for (int i = 0; i < 2; ++i) keys_[i] = mask_.row_key(row + i * 32 + threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kEighths; ++i) factors_[i] = Mask::factor(4 * i + threadIdx.x % 4);
  }

  __device__ __forceinline__ void draw(int i) {
    const int lane = threadIdx.x % 32;
    const uint32_t key = __shfl_sync(~0u, i < 4 ? keys_[0] : keys_[1], i % 4 * 8 + lane / 4);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 2 * P::kCols; ++j) {
      bits |= mask_.kept_bits(Mask::group_key(key, group_ + j / kEighths), factors_[j % kEighths]) & 0x10001 << j;
    }
    bits <<= i % 2 * 8;
#pragma unroll
    for (int k = 0; k < P::kRows; ++k) kept_[k] |= k == i / 2 ? bits : 0;
  }

  // Beside a step.
  __device__ void begin(uint32_t) {}
  __device__ void see(uint32_t) { draw(drawn_++); }
  __device__ void change(uint32_t) {}

  __device__ __forceinline__ void draw_rest() {
#pragma unroll 1
    while (drawn_ < kDraws) draw(drawn_++);
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
  static constexpr int kEighths = Mask::kGroup / 8;

  // Of the first of a pair of columns; the other one's is 16 higher.
  static __device__ constexpr int bit(int eighth, int j) { return eighth * 8 + j; }

  Sums& sums_;
  Mask mask_;
  int group_, drawn_ = 0;
  uint32_t keys_[2], factors_[kEighths];
  uint32_t kept_[P::kRows] = {};
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
