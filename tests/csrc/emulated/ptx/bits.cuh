#pragma once
#include <cstdint>
namespace fused_lora::ptx {
// Of positive ones.
inline uint32_t at_or_above(uint32_t halves, uint32_t others) {
  uint32_t is = 0;
  for (int shift : {0, 16}) {
    const uint32_t a = halves >> shift & 0xFFFF, b = others >> shift & 0xFFFF;
    if (a >= b && a <= 0x7C00) is |= 0xFFFFu << shift;
  }
  return is;
}
inline uint32_t opaque(uint32_t bits) { return bits; }
inline uint64_t wide_product(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
}  // namespace fused_lora::ptx
