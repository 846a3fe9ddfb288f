// Sums on their way to memory, rounded once.
#pragma once

#include "../elements.cuh"
#include "../mask.cuh"
#include "params.cuh"
#include "product.cuh"

namespace fused_lora::sm80 {

// Words of four lanes side by side change places: lane i gets the i-th word of each.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x % 2, high = threadIdx.x / 2 % 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    (odd ? words[i] : words[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(~0u, high ? words[i] : words[i + 2], 2);
    (high ? words[i] : words[i + 2]) = other;
  }
}

// A product's rows and columns from (row, col) on, into a matrix of `rows` x `cols`. Where rows start at multiples of 16 bytes, a
// lane writes 8 columns at once.
template <typename T, typename P>
__device__ __forceinline__ void store_rows(const Sums& of, const Matrix& to, int row, int col, int rows, int cols) {
  const int lane = threadIdx.x % 32;
  const bool whole = to.stride % 16 == 0;
  char* data = const_cast<char*>(to.data);
#pragma unroll
  for (int i = 0; i < 2 * P::kRows; ++i) {
    const int own_row = row + i * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < 2 * P::kCols; j += 4) {
      uint32_t words[4] = {};
#pragma unroll
      for (int k = 0; k < 4 && j + k < 2 * P::kCols; ++k) {
        const float(&sums)[4] = P::of(of, i / 2, j + k);
        words[k] = pack<T>(sums[i % 2 * 2], sums[i % 2 * 2 + 1]);
      }
      if (whole) transpose_quad(words);
      const int own_col = col + j * 8 + (whole ? lane % 4 * 8 : lane % 4 * 2);
      if (own_row >= rows) continue;
      char* at = data + int64_t{own_row} * to.stride + own_col * 2;
      if (whole && own_col + 8 <= cols) {
        *reinterpret_cast<uint4*>(at) = {words[0], words[1], words[2], words[3]};
        continue;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int c = whole ? 2 * k : 8 * k;
        uint16_t* pair = reinterpret_cast<uint16_t*>(at) + c;
        if (own_col + c < cols) pair[0] = words[k];
        if (own_col + c + 1 < cols) pair[1] = words[k] >> 16;
      }
    }
  }
}

template <typename P>
__device__ __forceinline__ void scale_by(Sums& of, float scale) {
#pragma unroll
  for (int i = 0; i < P::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * P::kCols; ++j) {
#pragma unroll
      for (float& sum : P::of(of, i, j)) sum *= scale;
    }
  }
}

// A product's rows and columns from (row, col) on.
template <typename P>
__device__ __forceinline__ void mask_rows(Sums& of, const Mask& mask, int row, int col) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * P::kRows; ++i) {
    const Mask::RowKey key = mask.row_key(row + i * 8 + lane / 4);
#pragma unroll
    for (int j = 0; j < 2 * P::kCols; ++j) {
      const uint32_t kept = mask.kept_bits(Mask::group_key(key, col / 8 + j), lane % 4);
      float* pair = P::of(of, i / 2, j) + i % 2 * 2;
      if (!(kept & 0xFFFF)) pair[0] = 0;
      if (!(kept >> 16)) pair[1] = 0;
    }
  }
}

template <typename P>
__device__ __forceinline__ void add_bias(Sums& of, const Part& part, int col) {
  if (part.bias == nullptr) return;
#pragma unroll
  for (int j = 0; j < 2 * P::kCols; ++j) {
    const int c = col + j * 8 + threadIdx.x % 4 * 2;
    const float a = c < part.cols ? load_as_float(part.bias, part.bias_dtype, c) : 0;
    const float b = c + 1 < part.cols ? load_as_float(part.bias, part.bias_dtype, c + 1) : 0;
#pragma unroll
    for (int i = 0; i < P::kRows; ++i) {
      float(&sums)[4] = P::of(of, i, j);
      sums[0] += a;
      sums[1] += b;
      sums[2] += a;
      sums[3] += b;
    }
  }
}

}  // namespace fused_lora::sm80
