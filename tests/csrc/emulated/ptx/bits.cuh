#pragma once
#include <cstdint>
namespace fused_lora::ptx {
inline uint32_t spread_signs(uint32_t halves) { return (halves >> 31) * 0xFFFF0000u | (halves >> 15 & 1) * 0xFFFFu; }
inline uint32_t opaque(uint32_t bits) { return bits; }
inline uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (c & (a | b)); }
inline uint64_t wide_product(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
}  // namespace fused_lora::ptx
