// One of the warpgroups that multiply, and where this thread's part of its results lies.
#pragma once

#include "../ptx/sync.cuh"
#include "pipeline.cuh"

namespace fused_lora::sm90 {

struct Warpgroup {
  const int index;  // 0 or 1: which 64 of a tile's 128 rows

  __device__ int thread() const { return threadIdx.x % kWarpgroup; }
  __device__ int lane() const { return threadIdx.x % 32; }
  // In each 64 rows and 8 columns of an accumulator: col() and the next, of rows row() and row() + 8.
  __device__ int row() const { return thread() / 32 * 16 + lane() / 4; }
  __device__ int col() const { return lane() % 4 * 2; }
  __device__ void sync() const { ptx::named_barrier(1 + index, kWarpgroup); }
};

}  // namespace fused_lora::sm90
