// Sums over tokens of a gradient item's columns, which for dy are dbias: by ordinary additions while the tensor cores multiply.
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
  __device__ void add(uint32_t boxes) {
#pragma unroll
    for (int i = 0; i < kBox / kRowGroups; ++i) {
      const int row = row_ + i * kRowGroups;
      const uint4 v = ptx::load_shared(boxes + chunk_ / 8 * kBoxBytes + swizzled(row, chunk_ % 8));
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack<T>(pairs[j]);
        sums_[2 * j] += pair.x;
        sums_[2 * j + 1] += pair.y;
      }
    }
    __syncwarp();  // one thread of the warp gives the stage back for all
  }

  __device__ float sum() {
    float mine = 0;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
#pragma unroll
      for (int distance = 1; distance < kRowGroups; distance *= 2) sums_[j] += __shfl_xor_sync(~0u, sums_[j], distance);
      if (row_ == j) mine = sums_[j];
    }
    return mine;
  }

 private:
  static constexpr int kChunk = 8;  // columns in 16 bytes
  static constexpr int kRowGroups = kWarpgroup / (kCols / kChunk);

  int chunk_, row_;
  float sums_[kChunk] = {};
};

}  // namespace fused_lora::sm90
