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

}  // namespace fused_lora::ptx
