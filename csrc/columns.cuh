// What a column of a forward pass's sums is multiplied by, and what is added then.
#pragma once

#include "elements.cuh"
#include "ptx/sync.cuh"

namespace fused_lora {

struct Column {
  static constexpr int kBytes = 8;  // as kept in shared memory

  float gain, bias;

  template <typename Part>
  static __device__ __forceinline__ Column of(const Part& part, int c) {
    return {part.gain == nullptr ? 1 : part.gain[c], part.bias == nullptr ? 0 : load_as_float(part.bias, part.bias_dtype, c)};
  }

  __device__ __forceinline__ void keep(uint32_t address) const {
    ptx::store_shared(address, __float_as_uint(gain));
    ptx::store_shared(address + 4, __float_as_uint(bias));
  }

  __device__ __forceinline__ void finish(float& sum) const { sum = fmaf(sum, gain, bias); }
};

// An even column and the next one, from shared memory: four sums are those of both in two rows.
struct ColumnPair {
  Column a, b;

  static __device__ __forceinline__ ColumnPair kept(uint32_t address) {
    const uint4 v = ptx::load_shared(address);
    return {{__uint_as_float(v.x), __uint_as_float(v.y)}, {__uint_as_float(v.z), __uint_as_float(v.w)}};
  }

  __device__ __forceinline__ void finish(float* four) const {
    a.finish(four[0]);
    b.finish(four[1]);
    a.finish(four[2]);
    b.finish(four[3]);
  }
};

}  // namespace fused_lora
