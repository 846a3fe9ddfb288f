// What is done to the elements of tiles of act(gate) up and of its gradient.
#pragma once

#include "activation.cuh"
#include "ptx/sync.cuh"

namespace fused_lora {

// Of act(gate) up: matrices of one stride. Forward, gate and up are null where they are not wanted; backward, hidden is. With
// factors, gate and up are act(gate) and act'(gate) up instead.
struct Gated {
  void *gate, *up, *hidden, *dgate, *dup;
  int64_t stride;
  Activation activation;
  bool factors;
};

// kFactors: forward makes the factors that backward multiplies the gradient by, and backward reads them. kCubic: the activation
// has its cubic term. Chosen once a kernel: a branch between elements would have each wait for the one before.
template <bool kFactors_, bool kCubic_>
struct Form {
  static constexpr bool kFactors = kFactors_, kCubic = kCubic_;
};

// 8 elements of a row. Forward their gate and up come, backward a gradient as well, and gate and up or the factors.
// kGrads: backward.
template <typename T, typename F, bool kGrads>
struct Gate {
  static constexpr int kOperands = kGrads ? 3 : 2;
  using Operands = uint4[kOperands];

  const Gated& gated;
  const Act<T, F::kCubic> act{gated.activation};

  static __device__ uint4* at(void* matrix, int64_t offset) { return reinterpret_cast<uint4*>(static_cast<T*>(matrix) + offset); }

  // The results in place of the operands; forward there is one more.
  __device__ __forceinline__ void turn(Operands& v, uint4& hidden) const {
    turn_pairs(v, hidden, &uint4::x);
    turn_pairs(v, hidden, &uint4::y);
    turn_pairs(v, hidden, &uint4::z);
    turn_pairs(v, hidden, &uint4::w);
  }
  __device__ __forceinline__ void turn_pairs(Operands& v, uint4& hidden, unsigned int uint4::*i) const {
    if constexpr (!kGrads) {
      hidden.*i = F::kFactors ? act.hidden_and_factors(v[0].*i, v[1].*i) : act.hidden(v[0].*i, v[1].*i);
    } else if constexpr (F::kFactors) {
      const uint32_t value = v[1].*i;
      v[1].*i = multiply_pairs<T>(v[0].*i, v[2].*i);
      v[2].*i = multiply_pairs<T>(v[0].*i, value);
    } else {
      act.turn(v[0].*i, v[1].*i, v[2].*i);
      hidden.*i = v[0].*i;
    }
  }

  __device__ __forceinline__ void store(const Operands& v, const uint4& hidden, int64_t to) const {
    if (kGrads || gated.gate != nullptr) {
      ptx::store_global(at(kGrads ? gated.dgate : gated.gate, to), v[kOperands - 2]);
      ptx::store_global(at(kGrads ? gated.dup : gated.up, to), v[kOperands - 1]);
    }
    if (!(kGrads && F::kFactors) && gated.hidden != nullptr) ptx::store_global(at(gated.hidden, to), hidden);
  }
};

template <bool kGrads, typename Run>
__device__ __forceinline__ void in_form(const Gated& gated, Run run) {
  const bool cubic = gated.activation.cubic != 0;
  if (!gated.factors) return cubic ? run(Form<false, true>()) : run(Form<false, false>());
  if constexpr (!kGrads) {
    if (cubic) return run(Form<true, true>());
  }
  run(Form<true, false>());  // backward multiplies by them and has no activation, cubic or not
}

}  // namespace fused_lora
