// act(gate) up of pairs of 16-bit numbers, and its gradients. act(t) = t sigmoid(t (linear + cubic t^2)).
#pragma once

#include "elements.cuh"
#include "lora_linear.h"
#include "ptx/math.cuh"

namespace fused_lora {

// Without kCubic, cubic is 0.
template <typename T, bool kCubic>
class Act {
 public:
  __device__ explicit Act(const Activation& activation) : linear_(activation.linear), cubic_(activation.cubic) {}

  __device__ __forceinline__ uint32_t hidden(uint32_t gate, uint32_t up) const {
    const float2 g = unpack<T>(gate), u = unpack<T>(up);
    return pack<T>(at(g.x).value * u.x, at(g.y).value * u.y);
  }

  // The same; gate and up become what its gradient is to be multiplied by for up's and for gate's.
  __device__ __forceinline__ uint32_t hidden_and_factors(uint32_t& gate, uint32_t& up) const {
    const float2 g = unpack<T>(gate), u = unpack<T>(up);
    const Both a = at(g.x), b = at(g.y);
    gate = pack<T>(a.value, b.value);
    up = pack_finite<T>(a.slope * u.x, b.slope * u.y);
    return pack<T>(a.value * u.x, b.value * u.y);
  }

  // From the gradient of act(gate) up: gate and up become their gradients, and it becomes act(gate) up.
  __device__ __forceinline__ void turn(uint32_t& grad, uint32_t& gate, uint32_t& up) const {
    const float2 d = unpack<T>(grad), g = unpack<T>(gate), u = unpack<T>(up);
    const Both a = at(g.x), b = at(g.y);
    grad = pack<T>(a.value * u.x, b.value * u.y);
    gate = pack<T>(d.x * (a.slope * u.x), d.y * (b.slope * u.y));
    up = pack<T>(d.x * a.value, d.y * b.value);
  }

 private:
  struct Both {
    float value, slope;
  };

  // Far out, exp is infinite or 0, and the sigmoid 0 or 1; an infinite square would make 0 of it NaN.
  __device__ __forceinline__ Both at(float t) const {
    constexpr float kLog2E = 1.442695041f, kFar = 1e30f;
    const float square = fminf(cubic_ * t * t, kFar), inner = kCubic ? linear_ + square : linear_;
    const float sigmoid = ptx::reciprocal(1.0f + ptx::exp2(-kLog2E * inner * t)), value = t * sigmoid;
    return {value, sigmoid + value * (1.0f - sigmoid) * (kCubic ? linear_ + 3.0f * square : linear_)};
  }

  const float linear_, cubic_;
};

}  // namespace fused_lora
