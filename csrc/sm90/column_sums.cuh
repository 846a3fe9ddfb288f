// Sums over tokens of a gradient item's columns of dy, which are dbias, and of dy y, of which dgain is made: by ordinary additions
// while the tensor cores multiply.
#pragma once

#include "../ptx/sync.cuh"
#include "fragments.cuh"
#include "warpgroup.cuh"

namespace fused_lora::sm90 {

template <typename C, typename T>
class ColumnSums {
 public:
  static constexpr int kCols = C::kGradientBlocks * kBox;  // a warpgroup's

  __device__ explicit ColumnSums(const Warpgroup& self) : chunk_(self.thread() / kRowGroups), row_(self.thread() % kRowGroups) {}

  // Column of the warpgroup's whose sum a thread holds in the end, if it holds one.
  static __device__ bool holds(const Warpgroup& self) { return self.thread() % kRowGroups < kChunk; }
  static __device__ int col(const Warpgroup& self) { return self.thread() / kRowGroups * kChunk + self.thread() % kRowGroups; }

  // Adds a step's tokens, in boxes side by side.
  __device__ void add(uint32_t dy) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float own[kChunk];
      read(dy, i, own);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sums_[j] += own[j];
    }
    __syncwarp();  // one thread of the warp gives the stage back for all
  }

  __device__ void add(uint32_t dy, uint32_t y) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float own[kChunk], made[kChunk];
      read(dy, i, own);
      read(y, i, made);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        sums_[j] += own[j];
        products_[j] = fmaf(own[j], made[j], products_[j]);
      }
    }
    __syncwarp();
  }

  __device__ float sum() { return over_rows(sums_); }
  __device__ float product() { return over_rows(products_); }

 private:
  static constexpr int kChunk = 8;  // columns in 16 bytes
  static constexpr int kRowGroups = kWarpgroup / (kCols / kChunk), kRows = kBox / kRowGroups;  // of a thread, in a step

  __device__ void read(uint32_t boxes, int i, float (&values)[kChunk]) const {
    const uint4 v = ptx::load_shared(boxes + chunk_ / 8 * kBoxBytes + swizzled(row_ + i * kRowGroups, chunk_ % 8));
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack<T>(pairs[j]);
      values[2 * j] = pair.x;
      values[2 * j + 1] = pair.y;
    }
  }

  // Of the column that this thread holds.
  __device__ float over_rows(float (&each)[kChunk]) const {
    float mine = 0;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
#pragma unroll
      for (int distance = 1; distance < kRowGroups; distance *= 2) each[j] += __shfl_xor_sync(~0u, each[j], distance);
      if (row_ == j) mine = each[j];
    }
    return mine;
  }

  int chunk_, row_;
  float sums_[kChunk] = {}, products_[kChunk] = {};
};

}  // namespace fused_lora::sm90
