#pragma once
#include <cmath>
namespace fused_lora::ptx {
inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
}  // namespace fused_lora::ptx
