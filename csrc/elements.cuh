// Numbers of 16 bits: rounding to them, and those in memory whose dtype is known at run time only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace fused_lora {

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

// float16 ends at 65,504. Where a forward's scale is above 1, its power of two stays out of low, which is rounded, and enters the
// sums: low is then never larger than it is without a scale.
template <typename T>
constexpr bool kHasRoom = std::is_same_v<T, __half>;

__device__ __forceinline__ float room(float scale) {
  const int exponent = static_cast<int>(__float_as_uint(scale) >> 23 & 255) - 126;
  return exponent > 0 ? __uint_as_float((exponent + 127) << 23) : 1.0f;
}

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat16: return __half2float(static_cast<const __half*>(data)[i]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
}

__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[i] = value; break;
    case DType::kFloat16: static_cast<__half*>(data)[i] = __float2half_rn(value); break;
    default: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
  }
}

}  // namespace fused_lora
