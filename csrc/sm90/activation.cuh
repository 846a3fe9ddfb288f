// act(gate) up of pairs of 16-bit numbers, and its gradients. act(t) = t sigmoid(t (linear + cubic t^2)).
#pragma once

#include "../lora_linear.h"
#include "../ptx/math.cuh"
#include "fragments.cuh"

namespace fused_lora::sm90 {

class Act {
 public:
  __device__ explicit Act(const Activation& activation) : linear_(activation.linear), cubic_(activation.cubic) {}

  template <typename T>
  __device__ __forceinline__ uint32_t hidden(uint32_t gate, uint32_t up) const {
    const float2 g = unpack<T>(gate), u = unpack<T>(up);
    return pack<T>(value(g.x) * u.x, value(g.y) * u.y);
  }

  // From the gradient of act(gate) up: gate and up become their gradients, and it becomes act(gate) up.
  template <typename T>
  __device__ __forceinline__ void turn(uint32_t& grad, uint32_t& gate, uint32_t& up) const {
    float2 d = unpack<T>(grad), g = unpack<T>(gate), u = unpack<T>(up);
    turn(d.x, g.x, u.x);
    turn(d.y, g.y, u.y);
    grad = pack<T>(d.x, d.y);
    gate = pack<T>(g.x, g.y);
    up = pack<T>(u.x, u.y);
  }

 private:
  // Far out, exp is infinite or 0, and the quotient 0 or 1.
  __device__ __forceinline__ float sigmoid(float t) const {
    constexpr float kLog2E = 1.442695041f;
    return ptx::reciprocal(1.0f + ptx::exp2(-kLog2E * t * (linear_ + cubic_ * t * t)));
  }
  __device__ __forceinline__ float value(float t) const { return t * sigmoid(t); }
  __device__ __forceinline__ void turn(float& grad, float& gate, float& up) const {
    const float s = sigmoid(gate), act = gate * s;
    const float slope = s + act * (1.0f - s) * (linear_ + 3.0f * cubic_ * gate * gate);
    const float dgate = grad * up * slope, dup = grad * act;
    grad = act * up;
    gate = dgate;
    up = dup;
  }

  const float linear_, cubic_;
};

}  // namespace fused_lora::sm90
