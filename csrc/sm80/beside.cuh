// What a gradient or shrink item's threads do beside its products, step by step.
#pragma once

#include "../elements.cuh"
#include "../mask.cuh"
#include "params.cuh"

namespace fused_lora::sm80 {

struct Nothing {
  __device__ void begin(uint32_t) {}
  __device__ void see(uint32_t) {}
  __device__ void change(uint32_t) {}
};

// Of the left operand's columns, MN-major, over tokens: a thread has a column.
template <typename T>
struct ColumnSums {
  float& sum;

  __device__ void begin(uint32_t) {}
  // A step, which everybody may read.
  __device__ __forceinline__ void see(uint32_t stage) {
    const uint32_t at = stage + mn_major<kBlockM>(0, threadIdx.x / 8) + threadIdx.x % 8 * 2;
#pragma unroll
    for (int row = 0; row < kDepth; ++row) {
      sum += unpack<T>(ptx::load_shared_16((at ^ (row % 8 << 4)) + row * kBlockM * 2)).x;
    }
  }
  __device__ void change(uint32_t) {}
};

// Masks the left operand, which is of x: a thread those chunks that it has copied itself, before a barrier shows them to others.
// kMN: MN-major, in dA's items.
template <bool kMN>
class StepMask {
 public:
  // Of x from (row, col) on.
  __device__ __forceinline__ StepMask(const Dropout& dropout, int row, int col, int steps) : mask_(dropout), unmasked_(steps) {
    if constexpr (kMN) {
      row_ = row + threadIdx.x / kAcross + threadIdx.x % 32 * kDown;
      group_ = col / 8 + threadIdx.x % kAcross;
      at_ = mn_major<kBlockM>(threadIdx.x / kAcross, threadIdx.x % kAcross);
    } else {
      group_ = col / 8 + threadIdx.x % 4;
      at_ = k_major(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) keys_[i] = mask_.row_key(row + threadIdx.x / 4 + i * Copies<kBlockM>::kAcross);
    }
  }

  __device__ __forceinline__ void begin(uint32_t stage) {
    change(stage);
    __syncthreads();
  }
  __device__ void see(uint32_t) {}

  // The next step, which this thread's copies of have arrived.
  __device__ __forceinline__ void change(uint32_t stage) {
    if (unmasked_ == 0) return;
    --unmasked_;
    if (kMN && lane_ == 32) make_keys();
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t address = stage + at_ + i * kPassBytes;
      const uint32_t key = Mask::group_key(kMN ? Mask::of_lane(keys_[0], lane_ + i) : keys_[i], group_);
      uint4 v = ptx::load_shared(address);
      v.x &= mask_.kept_bits(key, 0);
      v.y &= mask_.kept_bits(key, 1);
      v.z &= mask_.kept_bits(key, 2);
      v.w &= mask_.kept_bits(key, 3);
      ptx::store_shared(address, v);
    }
    if constexpr (kMN) lane_ += kPasses;
    else group_ += kDepth / 8;
  }

 private:
  static constexpr int kPasses = Copies<kBlockM>::kPasses, kDown = Copies<kBlockM>::kDown;
  static constexpr int kAcross = kBlockM / 8;  // chunks of a row, MN-major: a warp's are of one
  static_assert(kAcross == 32 && kDown * kPasses == kDepth);

  // Of the rows that the warp copies in the next steps, one a lane: each row's is dear, and wanted by all.
  __device__ __forceinline__ void make_keys() {
    keys_[0] = mask_.row_key(row_);
    row_ += 32 * kDown;
    lane_ = 0;
  }

  Mask mask_;
  int unmasked_, row_, group_;
  uint32_t at_;
  Mask::RowKey keys_[kMN ? 1 : kPasses];  // MN-major this lane's, else those of the thread's rows
  int lane_ = 32;  // who has the next row's
};

}  // namespace fused_lora::sm80
