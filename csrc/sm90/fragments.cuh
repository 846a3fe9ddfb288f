// Operands in shared memory as the tensor cores are told of them, and their results in 16 bits.
#pragma once

#include <type_traits>

#include "../ptx/wgmma.cuh"
#include "tensor_map.h"

namespace fused_lora::sm90 {

constexpr int kSlices = kBox / 16;  // of the summed index, in a box

// Where the 128-byte swizzle has the 16-byte chunk `chunk` of a box's row.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ row % 8) << 4); }

// An operand in boxes: K-major ones are stacked along M or N, MN-major ones lie side by side along it.
template <bool kMN>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 8 * 128, kNextBox = kMN ? kBoxBytes : 16;
  return kSwizzle128 << 62 | (kEightRows >> 4) << 32 | (kNextBox >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
// From one slice to the next: 16 elements of a row, or 16 rows.
template <bool kMN>
constexpr uint64_t kSlice = (kMN ? 16 * 128 : 16 * 2) >> 4;

template <typename T>
struct Round;
template <>
struct Round<__nv_bfloat16> {
  static __device__ __nv_bfloat162 pair(float a, float b) { return __floats2bfloat162_rn(a, b); }
  // In one instruction each.
  static __device__ float2 wide(__nv_bfloat162 pair) {
    const uint32_t bits = reinterpret_cast<const uint32_t&>(pair);
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000)};
  }
};
template <>
struct Round<__half> {
  static __device__ __half2 pair(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ float2 wide(__half2 pair) { return __half22float2(pair); }
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  const auto pair = Round<T>::pair(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

// What float16 cannot hold becomes its largest number.
template <typename T>
__device__ __forceinline__ uint32_t pack_finite(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    constexpr float kMost = 65504;
    a = fminf(fmaxf(a, -kMost), kMost);
    b = fminf(fmaxf(b, -kMost), kMost);
  }
  return pack<T>(a, b);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return Round<T>::wide(reinterpret_cast<const decltype(Round<T>::pair(0, 0))&>(pair));
}

// Rounded once.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  using Pair = decltype(Round<T>::pair(0, 0));
  const Pair product = __hmul2_rn(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

}  // namespace fused_lora::sm90
