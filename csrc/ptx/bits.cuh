// Bits of registers.
#pragma once

#include <cstdint>

namespace fused_lora::ptx {

// Of each half, its highest bit in all of them.
__device__ __forceinline__ uint32_t spread_signs(uint32_t halves) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(spread) : "r"(halves));
  return spread;
}

// The same bits, of which the compiler knows nothing: what is made of them is made here, not before a loop and kept.
__device__ __forceinline__ uint32_t opaque(uint32_t bits) {
  asm volatile("" : "+r"(bits));
  return bits;
}

// Where at least two of three bits are set. The compiler makes it a choice where it knows that one word's bits are alike.
__device__ __forceinline__ uint32_t majority(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t most;
  asm("lop3.b32 %0, %1, %2, %3, 0xE8;" : "=r"(most) : "r"(a), "r"(b), "r"(c));
  return most;
}

// A product of 64 bits; in C++ the compiler adds a product by the zeros above a factor that it has lost sight of.
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

}  // namespace fused_lora::ptx
