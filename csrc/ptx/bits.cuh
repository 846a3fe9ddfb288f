// Bits of registers.
#pragma once

#include <cstdint>

namespace fused_lora::ptx {

// Of each half as a float16 all bits where it is at or above the other word's; what is no number is above nothing. For positive ones
// that is the order of their bits, up to infinity's, 0x7C00.
__device__ __forceinline__ uint32_t at_or_above(uint32_t halves, uint32_t others) {
  uint32_t is;
  asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(is) : "r"(halves), "r"(others));
  return is;
}

// The same bits, of which the compiler knows nothing: what is made of them is made here, not before a loop and kept.
__device__ __forceinline__ uint32_t opaque(uint32_t bits) {
  asm volatile("" : "+r"(bits));
  return bits;
}

// A product of 64 bits; in C++ the compiler adds a product by the zeros above a factor that it has lost sight of.
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

}  // namespace fused_lora::ptx
