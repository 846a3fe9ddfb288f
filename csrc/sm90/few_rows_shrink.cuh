// low = scale x A^T of few rows: each warp two ranks of a row, of a part of the depth. No tensor cores, since each row may have an
// adapter of its own.
#pragma once

#include "few_rows.cuh"

namespace fused_lora::sm90 {

constexpr int kDepths = 4, kWarpRanks = 2, kShrinkWarps = 16;  // warps that share a depth; ranks of each
constexpr int kBlockRanks = kShrinkWarps / kDepths * kWarpRanks;
constexpr int kAhead = 4;  // chunks that a thread asks for at once

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  return value;
}

// Of the next kCount chunks of a thread, which are all asked for before one is waited for.
template <typename T, int kCount, int kStep>
__device__ __forceinline__ void add_dots(float (&sums)[kWarpRanks], const uint16_t* x, const uint16_t* A, int64_t A_stride) {
  uint4 of_x[kCount], of_A[kCount][kWarpRanks];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    of_x[i] = ptx::load_now(x + i * kStep);
#pragma unroll
    for (int j = 0; j < kWarpRanks; ++j) of_A[i][j] = ptx::load_once(A + j * A_stride + i * kStep);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpRanks; ++j) sums[j] = add_dot<T>(sums[j], of_x[i], of_A[i][j]);
  }
}

// A row of boxes has the ranks of all the block's windows: zeros for those that are not its own.
__device__ inline void clear_others(const FewRows& p, int row, const Adapter& own) {
  const int of_window = p.r / work::kSlice;
  const int first = own.block.first / of_window * of_window;
  const int end = own.block.first == own.block.last ? first : ceil_div(own.block.last, of_window) * of_window;
  for (int chunk = 2 * first + threadIdx.x; chunk < 2 * end; chunk += blockDim.x) {
    if (own.has(chunk / 2)) continue;
    *reinterpret_cast<uint4*>(own.low_of_slice(p, row, chunk / 2) + chunk % 2 * kChunk) = uint4{};
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kShrinkWarps, 2) shrink_few_rows_kernel(const __grid_constant__ FewRows p, int blocks_of_row) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  ptx::let_next_launch_begin();
  // blocks_of_row for each row of x; of segments, whose boxes are whole, one for each row behind them.
  const int behind = static_cast<int>(blockIdx.x) / p.levels() - p.M * blocks_of_row, level = blockIdx.x % p.levels();
  const int row = behind < 0 ? static_cast<int>(blockIdx.x) / p.levels() / blocks_of_row : p.M + behind;
  const int turn = behind < 0 ? static_cast<int>(blockIdx.x) / p.levels() % blocks_of_row : 0;
  const Adapter own(p, level, row);
  if (p.segmented() && turn == 0) clear_others(p, row, own);
  constexpr int kStep = kDepths * 32 * kChunk;
  __shared__ float of_warps[kShrinkWarps][kWarpRanks];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = kHasRoom<T> ? own.scale / room(own.scale) : own.scale;
  for (int begin = turn * kBlockRanks; begin < own.ranks; begin += blocks_of_row * kBlockRanks) {
    const int first = begin + warp / kDepths * kWarpRanks;
    if (first < own.ranks) {
      const uint16_t *x = p.x + row * p.x_stride, *A = p.down + (own.rank + first) * p.down_stride;
      float sums[kWarpRanks] = {};
      int k = (warp % kDepths * 32 + lane) * kChunk;
      for (; k + (kAhead - 1) * kStep < p.K; k += kAhead * kStep) add_dots<T, kAhead, kStep>(sums, x + k, A + k, p.down_stride);
      for (; k < p.K; k += kStep) add_dots<T, 1, kStep>(sums, x + k, A + k, p.down_stride);
#pragma unroll
      for (int i = 0; i < kWarpRanks; ++i) {
        const float sum = sum_of_warp(sums[i]);
        if (lane == 0) of_warps[warp][i] = sum;
      }
    }
    __syncthreads();
    if (first < own.ranks && lane == 0 && warp % kDepths == 0) {
      float sums[kWarpRanks] = {};
      for (int depth = 0; depth < kDepths; ++depth) {
        for (int i = 0; i < kWarpRanks; ++i) sums[i] += of_warps[warp + depth][i];
      }
      *reinterpret_cast<uint32_t*>(own.low(p, row, first)) = pack<T>(sums[0] * scale, sums[1] * scale);
    }
    __syncthreads();
  }
#endif
}

}  // namespace fused_lora::sm90
