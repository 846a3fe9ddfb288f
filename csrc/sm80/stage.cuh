// What a step brings into shared memory: 256 rows of the left operand and 128 of the right one, 32 deep.
#pragma once

#include <cstdint>

#include "../ptx/address.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/sync.cuh"

namespace fused_lora::sm80 {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlockM = 256, kBlockN = 128, kDepth = 32;
constexpr int kPassBytes = kThreads * 16;  // which all threads copy at once
constexpr int kLeftBytes = kBlockM * kDepth * 2, kRightBytes = kBlockN * kDepth * 2, kStageBytes = kLeftBytes + kRightBytes;

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

// One operand of kWidth rows as a thread copies it: kPasses chunks of 16 bytes in each step of kDepth.
template <int kWidth>
struct Copies {
  static constexpr int kPasses = kWidth * kDepth * 2 / kPassBytes;
  static constexpr int kAcross = kThreads / 4, kDown = kThreads / (kWidth / 8);  // rows in a pass, K-major and MN-major

  const char* from;  // the first chunk of the next step
  int apart, step;   // bytes to the next chunk, and to the next step
  uint32_t to;       // where in a stage
  int count;         // chunks that lie in the matrix

  // Rows `first` to `last` of a matrix whose columns are summed over.
  __device__ __forceinline__ void begin_k_major(const Matrix& matrix, int first, int last) {
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
    from = matrix.data + int64_t{first + row} * matrix.stride + chunk * 16;
    apart = kAcross * matrix.stride;
    step = kDepth * 2;
    to = k_major(row, chunk);
    count = min(max(0, last - first - row + kAcross - 1) / kAcross, kPasses);
  }

  // Columns `first` to `last` of a matrix whose rows are summed over, from row `row` on.
  __device__ __forceinline__ void begin_mn_major(const Matrix& matrix, int row, int first, int last) {
    const int down = threadIdx.x / (kWidth / 8), chunk = threadIdx.x % (kWidth / 8);
    from = matrix.data + int64_t{row + down} * matrix.stride + (first + chunk * 8) * 2;
    apart = kDown * matrix.stride;
    step = kDepth * matrix.stride;
    to = mn_major<kWidth>(down, chunk);
    count = first + chunk * 8 < last ? kPasses : 0;
  }

  // Rows and columns beyond the matrix keep what was there: it ends in sums that nobody stores.
  __device__ __forceinline__ void copy(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (i < count) ptx::async_copy_16(stage + to + i * kPassBytes, from + i * apart);
    }
    from += step;
  }

  // The segment's last step, `left` deep, with zeros behind. They end within a chunk of 8 where columns are summed over.
  __device__ __forceinline__ void copy_end_k_major(uint32_t stage, int left) const {
    const int own = left - static_cast<int>(threadIdx.x) % 4 * 8;
    for (int i = 0; i < count; ++i) {
      const uint32_t target = stage + to + i * kPassBytes;
      if (own > 0 && own < 8) {
        ptx::store_shared(target, first_of(*reinterpret_cast<const uint4*>(from + i * apart), own));
      } else {
        ptx::async_copy_16_or_zeros(target, from + i * apart, own > 0);
      }
    }
  }
  __device__ __forceinline__ void copy_end_mn_major(uint32_t stage, int left) const {
    const int row = threadIdx.x / (kWidth / 8);
    for (int i = 0; i < count; ++i) {
      ptx::async_copy_16_or_zeros(stage + to + i * kPassBytes, from + i * apart, row + i * kDown < left);
    }
  }

 private:
  // The first `count` of 8 elements.
  static __device__ uint4 first_of(uint4 v, int count) {
    const auto kept = [count](uint32_t pair, int at) { return at + 1 < count ? pair : at < count ? pair & 0xFFFF : 0; };
    return {kept(v.x, 0), kept(v.y, 2), kept(v.z, 4), kept(v.w, 6)};
  }
};

}  // namespace fused_lora::sm80
