// What a warp multiplies: 16 kRows x 16 kCols of the left operand's rows and the right one's columns, by fragments that are read
// while those before are multiplied.
#pragma once

#include "../elements.cuh"
#include "../ptx/mma.cuh"
#include "stage.cuh"

namespace fused_lora::sm80 {

// A thread's sums, of whichever product.
constexpr int kAllSums = 32;
struct Sums {
  float of[kAllSums][4];
};

// kLeftMN, kRightMN: the operand is MN-major, and its fragments are transposed on their way. Its sums are those of 16 kAll columns,
// from 16 kBegin on.
template <typename T, int kRows_, int kCols_, bool kLeftMN, bool kRightMN, int kAll = kCols_, int kBegin = 0>
struct Product {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr uint32_t kPair = 32;  // bytes of two chunks, 16 elements

  // Of 16 rows and 8 columns: two of row lane / 4, columns lane % 4 * 2 and the next, and two of the row 8 below.
  static __device__ __forceinline__ float (&of(Sums& sums, int i, int j))[4] { return sums.of[2 * (i * kAll + kBegin) + j]; }
  static __device__ __forceinline__ const float (&of(const Sums& sums, int i, int j))[4] {
    return sums.of[2 * (i * kAll + kBegin) + j];
  }

  uint32_t left[2][kRows][4], right[2][kCols][4];
  uint32_t left_at, right_at;  // this lane's first chunk in the stage that is read; in chunks of a row, the swizzle is an exclusive or

  // The warp's first row and column among the stage's.
  __device__ __forceinline__ Product(uint32_t stage, int row, int col) {
    const int lane = threadIdx.x % 32;
    if constexpr (kLeftMN) {
      left_at = stage + mn_major<kBlockM>(lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2);
    } else {
      left_at = stage + k_major(row + lane % 16, lane / 16);
    }
    if constexpr (kRightMN) {
      right_at = stage + kLeftBytes + mn_major<kBlockN>(lane % 16, col / 8 + lane / 16);
    } else {
      right_at = stage + kLeftBytes + k_major(col + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
  }

  // To another stage.
  __device__ __forceinline__ void move(int bytes) {
    left_at = ptx::moved(left_at, bytes);
    right_at = ptx::moved(right_at, bytes);
  }

  // The fragments of a slice of 16.
  __device__ __forceinline__ void read(int buffer, int slice) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) read_left(buffer, slice, i);
#pragma unroll
    for (int j = 0; j < kCols; ++j) read_right(buffer, slice, j);
  }
  __device__ __forceinline__ void read_left(int buffer, int slice, int i) {
    if constexpr (kLeftMN) {
      ptx::ldmatrix_transposed(left[buffer][i], (left_at ^ i * kPair) + slice * 16 * kBlockM * 2);
    } else {
      ptx::ldmatrix(left[buffer][i], (left_at ^ slice * kPair) + i * 16 * kDepth * 2);
    }
  }
  __device__ __forceinline__ void read_right(int buffer, int slice, int j) {
    if constexpr (kRightMN) {
      ptx::ldmatrix_transposed(right[buffer][j], (right_at ^ j % 4 * kPair) + slice * 16 * kBlockN * 2 + j / 4 * 4 * kPair);
    } else {
      ptx::ldmatrix(right[buffer][j], (right_at ^ slice * kPair) + j * 16 * kDepth * 2);
    }
  }

  // Rows kFirst to kLast, in serpentine order: from one product to the next, one of the two operands stays.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void multiply(Sums& sums, int buffer) const {
#pragma unroll
    for (int i = kFirst; i < kLast; ++i) {
#pragma unroll
      for (int n = 0; n < 2 * kCols; ++n) {
        const int j = i % 2 ? 2 * kCols - 1 - n : n;
        multiply_one(of(sums, i, j), i, j, buffer);
      }
    }
  }

  // 16 rows by 8 columns.
  __device__ __forceinline__ void multiply_one(float (&sums)[4], int i, int j, int buffer) const {
    const uint32_t(&rhs)[4] = right[buffer][j / 2];
    ptx::mma<T>(sums, left[buffer][i], rhs[j % 2 * 2], rhs[j % 2 * 2 + 1]);
  }
};

}  // namespace fused_lora::sm80
