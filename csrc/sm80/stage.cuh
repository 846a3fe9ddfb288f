// What a step brings into shared memory: 256 rows of the left operand and 128 of the right one, 32 deep.
#pragma once

#include <cstdint>

#include "../lora_linear.h"
#include "../ptx/address.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/sync.cuh"

namespace fused_lora::sm80 {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlockM = 256, kBlockN = 128, kDepth = 32;
constexpr int kPassBytes = kThreads * 16;  // which all threads copy at once
constexpr int kLeftBytes = kBlockM * kDepth * 2, kRightBytes = kBlockN * kDepth * 2, kStageBytes = kLeftBytes + kRightBytes;
constexpr int kSlabBytes = kStageBytes / kWarps;  // a warp's share of a stage that nobody needs

// What fits in 163 and in 99 KB; cards from 9.0 on have the one or the other.
constexpr int kMostStages = 6, kFewStages = 4;
__host__ __device__ constexpr bool has_kernels(int stages, int capability) { return capability >= 90 || (stages == kMostStages) == (capability == 80); }

__host__ __device__ constexpr int steps_of(int depth) { return (depth + kDepth - 1) / kDepth; }

// Where chunk `chunk` of 16 bytes of a row lies: swizzled such that eight rows' chunks lie in different banks. K-major, a row is
// one of the matrix, of kDepth elements; MN-major it is one of the sum's, of kWidth elements.
__device__ __forceinline__ uint32_t k_major(int row, int chunk) { return row * (kDepth * 2) + ((chunk ^ (row >> 1 & 3)) << 4); }
template <int kWidth>
__device__ __forceinline__ uint32_t mn_major(int row, int chunk) {
  return row * (kWidth * 2) + ((chunk ^ (row & 7)) << 4);
}

struct Matrix {
  const char* data;
  int stride;  // bytes
};

// One operand of kWidth rows as a thread copies it: kPasses chunks of 16 bytes in each step of kDepth. What lies beyond the matrix
// becomes a copy of something in it, and ends in sums that nobody stores.
template <int kWidth>
struct Copies {
  static constexpr int kPasses = kWidth * kDepth * 2 / kPassBytes;
  static constexpr int kAcross = kThreads / 4, kDown = kThreads / (kWidth / 8);  // rows in a pass, K-major and MN-major
  static_assert((kBlockM - kAcross) * kMostStride * 2 < int64_t{1} << 31);

  const char* from;            // the first chunk of the step that was copied last
  uint32_t further[kPasses];   // bytes to each of its others
  int step;                    // and to the next step
  uint32_t to;                 // where in the first stage

  // Rows `first` to `last` of a matrix whose columns are summed over. `target`: the operand's in the first stage.
  __device__ __forceinline__ void begin_k_major(const Matrix& matrix, int first, int last, uint32_t target) {
    begin_rows(matrix, first + threadIdx.x / 4, last, kAcross, target);
  }

  // Halves of 32 rows in turn, one matrix's and another one's: this thread's is `matrix`. Both of its rows are 32 apart there.
  __device__ __forceinline__ void begin_halves(const Matrix& matrix, int first, int last, uint32_t target) {
    begin_rows(matrix, first + threadIdx.x / 4 % kHalf, last, kHalf, target);
  }
  static constexpr int kHalf = 32;
  static __device__ int half() { return threadIdx.x / 4 / kHalf; }

  // Columns `first` to `last` of a matrix whose rows are summed over, from row `row` on.
  __device__ __forceinline__ void begin_mn_major(const Matrix& matrix, int row, int first, int last, uint32_t target) {
    const int down = threadIdx.x / (kWidth / 8), chunk = threadIdx.x % (kWidth / 8), col = first + chunk * 8;
    from = matrix.data + int64_t{row + down - kDepth} * matrix.stride + (col < last ? col * 2 : 0);
#pragma unroll
    for (int i = 1; i < kPasses; ++i) further[i] = i * (kDown * matrix.stride);
    step = kDepth * matrix.stride;
    to = target + mn_major<kWidth>(down, chunk);
  }

  // To the next step.
  __device__ __forceinline__ void move() { from = ptx::moved(from, step); }

  // It, to a thread's first chunk, where it is wanted.
  __device__ __forceinline__ void copy(uint32_t first, bool wanted) { copy_passes<0>(first, wanted); }

  // The segment's last step, `left` deep, with zeros behind. They end within a chunk of 8 where columns are summed over.
  __device__ __forceinline__ void copy_end_k_major(uint32_t stage, int left) {
    move();
    const int own = left - static_cast<int>(threadIdx.x) % 4 * 8;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t target = stage + to + i * kPassBytes;
      if (own > 0 && own < 8) {
        ptx::store_shared(target, first_of(*reinterpret_cast<const uint4*>(chunk(i)), own));
      } else {
        ptx::async_copy_16_or_zeros(target, chunk(i), own > 0);
      }
    }
  }
  __device__ __forceinline__ void copy_end_mn_major(uint32_t stage, int left) {
    move();
    const int row = threadIdx.x / (kWidth / 8);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      ptx::async_copy_16_or_zeros(stage + to + i * kPassBytes, chunk(i), row + i * kDown < left);
    }
  }

 private:
  // Passes of rows that are `across` apart, the first one from `row`.
  __device__ __forceinline__ void begin_rows(const Matrix& matrix, int row, int last, int across, uint32_t target) {
    row = min(row, last - 1);
    from = matrix.data + int64_t{row} * matrix.stride + threadIdx.x % 4 * 16 - kDepth * 2;
#pragma unroll
    for (int i = 1; i < kPasses; ++i) further[i] = min(i * across, last - 1 - row) * matrix.stride;
    step = kDepth * 2;
    to = target + k_major(threadIdx.x / 4, threadIdx.x % 4);
  }

  template <int i>
  __device__ __forceinline__ void copy_passes(uint32_t first, bool wanted) const {
    ptx::async_copy_16_if<i * kPassBytes>(wanted, first, chunk(i));
    if constexpr (i + 1 < kPasses) copy_passes<i + 1>(first, wanted);
  }

  __device__ __forceinline__ const char* chunk(int i) const { return i == 0 ? from : from + further[i]; }

  // The first `count` of 8 elements.
  static __device__ uint4 first_of(uint4 v, int count) {
    const auto kept = [count](uint32_t pair, int at) { return at + 1 < count ? pair : at < count ? pair & 0xFFFF : 0; };
    return {kept(v.x, 0), kept(v.y, 2), kept(v.z, 4), kept(v.w, 6)};
  }
};

}  // namespace fused_lora::sm80
