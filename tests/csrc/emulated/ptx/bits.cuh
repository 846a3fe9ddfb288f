#pragma once
#include <cstdint>
namespace fused_lora::ptx {
inline uint32_t spread_signs(uint32_t halves) { return (halves >> 31) * 0xFFFF0000u | (halves >> 15 & 1) * 0xFFFFu; }
}  // namespace fused_lora::ptx
