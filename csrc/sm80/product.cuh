// What a warp multiplies: 16 kRows x 16 kCols of the left operand's rows and the right one's columns, by fragments that are read
// while those before are multiplied.
#pragma once

#include "../elements.cuh"
#include "../ptx/mma.cuh"
#include "stage.cuh"

namespace fused_lora::sm80 {

// A thread's sums, of whichever product.
struct Sums {
  float of[32][4];
};

// kLeftMN, kRightMN: the operand is MN-major, and its fragments are transposed on their way.
template <typename T, int kRows_, int kCols_, bool kLeftMN, bool kRightMN>
struct Product {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kSlices = kDepth / 16;

  // Of 16 rows and 8 columns: two of row lane / 4, columns lane % 4 * 2 and the next, and two of the row 8 below.
  static __device__ __forceinline__ float (&of(Sums& sums, int i, int j))[4] { return sums.of[i * 2 * kCols + j]; }
  static __device__ __forceinline__ const float (&of(const Sums& sums, int i, int j))[4] { return sums.of[i * 2 * kCols + j]; }

  uint32_t left[2][kRows][4], right[2][kCols][4];
  uint32_t left_at, right_at;  // of this lane in a stage
  int left_twist, right_twist;  // of its chunk, by the swizzle

  // The warp's first row and column among the stage's.
  __device__ __forceinline__ Product(int row, int col) {
    const int lane = threadIdx.x % 32;
    if constexpr (kLeftMN) {
      const int k = lane % 8 + lane / 16 * 8;
      left_at = k * (kBlockM * 2) + row / 64 * 128;
      left_twist = row / 8 % 8 ^ lane / 8 % 2 ^ k % 8;
    } else {
      left_at = (row + lane % 16) * (kDepth * 2);
      left_twist = lane / 16 ^ lane / 2 % 4;
    }
    if constexpr (kRightMN) {
      const int k = lane % 16;
      right_at = kLeftBytes + k * (kBlockN * 2) + col * 2;
      right_twist = lane / 16 ^ k % 8;
    } else {
      right_at = kLeftBytes + (col + lane % 8 + lane / 16 * 8) * (kDepth * 2);
      right_twist = lane / 8 % 2 ^ lane / 2 % 4;
    }
  }

  // The fragments of a stage's slice of 16.
  __device__ __forceinline__ void read(int buffer, uint32_t stage, int slice) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kLeftMN) {
        ptx::ldmatrix_transposed(left[buffer][i], stage + left_at + slice * 16 * kBlockM * 2 + ((2 * i ^ left_twist) << 4));
      } else {
        ptx::ldmatrix(left[buffer][i], stage + left_at + i * 16 * kDepth * 2 + ((2 * slice ^ left_twist) << 4));
      }
    }
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      if constexpr (kRightMN) {
        ptx::ldmatrix_transposed(right[buffer][j], stage + right_at + slice * 16 * kBlockN * 2 + ((2 * j ^ right_twist) << 4));
      } else {
        ptx::ldmatrix(right[buffer][j], stage + right_at + j * 16 * kDepth * 2 + ((2 * slice ^ right_twist) << 4));
      }
    }
  }

  // The left operand's rows by a column of ones: their sums, eight times.
  __device__ __forceinline__ void add_up(float (&totals)[kRows][4], int buffer) const {
    const uint32_t ones = pack<T>(1, 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) ptx::mma<T>(totals[i], left[buffer][i], ones, ones);
  }

  // In serpentine order: from one product to the next, one of the two operands stays.
  __device__ __forceinline__ void multiply(Sums& sums, int buffer) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int n = 0; n < 2 * kCols; ++n) {
        const int j = i % 2 ? 2 * kCols - 1 - n : n;
        const uint32_t(&rhs)[4] = right[buffer][j / 2];
        ptx::mma<T>(of(sums, i, j), left[buffer][i], rhs[j % 2 * 2], rhs[j % 2 * 2 + 1]);
      }
    }
  }
};

}  // namespace fused_lora::sm80
