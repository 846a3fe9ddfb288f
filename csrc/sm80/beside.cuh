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
    const int lane = threadIdx.x % 32, chunk = col / 8 + threadIdx.x % kAcross;
    group_ = chunk / kChunksOfGroup;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) factors_[i] = Mask::factor(chunk % kChunksOfGroup * kPairs + i);
    if constexpr (kMN) {
      row_ = row + threadIdx.x / kAcross + lane * kDown;
      at_ = mn_major<kBlockM>(threadIdx.x / kAcross, threadIdx.x % kAcross);
      lane_ = 32;
    } else {
      at_ = k_major(threadIdx.x / kAcross, threadIdx.x % kAcross);
      key_ = mask_.row_key(row + threadIdx.x / 32 * 8 + lane % 8 + lane / 8 * Copies<kBlockM>::kAcross);
      lane_ = lane / kAcross;
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
    if (kMN && lane_ == 32) make_key();
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t address = stage + at_ + i * kPassBytes;
      const uint32_t key = Mask::group_key(__shfl_sync(~0u, key_, lane_ + i * (kMN ? 1 : 8)), group_);
      uint4 v = ptx::load_shared(address);
      v.x &= mask_.kept_bits(key, factors_[0]);
      v.y &= mask_.kept_bits(key, factors_[1]);
      v.z &= mask_.kept_bits(key, factors_[2]);
      v.w &= mask_.kept_bits(key, factors_[3]);
      ptx::store_shared(address, v);
    }
    if constexpr (kMN) lane_ += kPasses;
    else ++group_;
  }

 private:
  static constexpr int kPasses = Copies<kBlockM>::kPasses, kDown = Copies<kBlockM>::kDown;
  static constexpr int kAcross = (kMN ? kBlockM : kDepth) / 8;  // chunks of a row
  static constexpr int kPairs = 4, kChunksOfGroup = Mask::kPairs / kPairs;  // of a chunk's columns
  static_assert(kPasses == 4 && kDown == 8 && kDepth == Mask::kGroup);

  // Of 32 rows that the warp copies in the next steps, one a lane.
  __device__ __forceinline__ void make_key() {
    key_ = mask_.row_key(row_);
    row_ += 32 * kDown;
    lane_ = 0;
  }

  Mask mask_;
  int unmasked_, row_, group_;
  uint32_t at_, factors_[kPairs];
  // Of a row, which is dear: each lane makes one of the warp's, and has the others from the lanes that made them.
  uint32_t key_;
  int lane_;  // who has the next one
};

}  // namespace fused_lora::sm80
