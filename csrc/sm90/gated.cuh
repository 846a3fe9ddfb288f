// What becomes of tiles of act(gate) up and of its gradient. The warpgroups that multiply leave boxes in shared memory, and two
// warps of the one that loads turn them into results: 20 instructions an element in between the products would stop them.
#pragma once

#include <type_traits>

#include "activation.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "warpgroup.cuh"

namespace fused_lora::sm90 {

// How: with factors that the forward pass has kept, or by the activation itself, without or with its cubic term.
enum class Form { kFactors, kLinear, kCubic };

// What is done to 8 elements of a row. Forward their gate and up come, backward a gradient as well, and gate and up or the factors.
template <typename C, typename T, Form kForm>
struct Gate {
  static constexpr int kOperands = C::kGateGrads ? 3 : 2;
  using Operands = uint4[kOperands];

  const KernelParams& p;
  const Act<T, kForm == Form::kCubic> act{p.gated.activation};

  static __device__ uint4* at(void* matrix, int64_t offset) { return reinterpret_cast<uint4*>(static_cast<T*>(matrix) + offset); }

  // The results in place of the operands; forward there is one more.
  __device__ __forceinline__ void turn(Operands& v, uint4& hidden) const {
    turn_pairs(v, hidden, &uint4::x);
    turn_pairs(v, hidden, &uint4::y);
    turn_pairs(v, hidden, &uint4::z);
    turn_pairs(v, hidden, &uint4::w);
  }
  __device__ __forceinline__ void turn_pairs(Operands& v, uint4& hidden, unsigned int uint4::*i) const {
    if constexpr (!C::kGateGrads) {
      hidden.*i = p.gated.factors ? act.hidden_and_factors(v[0].*i, v[1].*i) : act.hidden(v[0].*i, v[1].*i);
    } else if constexpr (kForm == Form::kFactors) {
      const uint32_t act = v[1].*i;
      v[1].*i = multiply_pairs<T>(v[0].*i, v[2].*i);
      v[2].*i = multiply_pairs<T>(v[0].*i, act);
    } else {
      act.turn(v[0].*i, v[1].*i, v[2].*i);
      hidden.*i = v[0].*i;
    }
  }

  __device__ __forceinline__ void store(const Operands& v, const uint4& hidden, int64_t to) const {
    if (C::kGateGrads || p.gated.gate != nullptr) {
      *at(C::kGateGrads ? p.gated.dgate : p.gated.gate, to) = v[kOperands - 2];
      *at(C::kGateGrads ? p.gated.dup : p.gated.up, to) = v[kOperands - 1];
    }
    if (kForm != Form::kFactors && p.gated.hidden != nullptr) *at(p.gated.hidden, to) = hidden;
  }
};

// Of those that a kernel can be asked for.
template <typename C, typename Run>
__device__ __forceinline__ void in_form(const Gated& gated, Run run) {
  if constexpr (C::kGateGrads) {
    if (gated.factors) return run(std::integral_constant<Form, Form::kFactors>());
  }
  if (gated.activation.cubic == 0) return run(std::integral_constant<Form, Form::kLinear>());
  run(std::integral_constant<Form, Form::kCubic>());
}

// A thread's share of a box of 64 x 64, of kThreads: each kThreads-th of its 512 chunks of 8 elements, counted along rows.
template <typename C, int kThreads>
struct Chunks {
  static constexpr int kCount = kBox * kBox / 8 / kThreads, kRows = kThreads / 8;  // kRows: from one chunk to the next
  static_assert(kRows % 8 == 0, "the swizzle is the same in all rows of a thread");

  int64_t offset;  // of the first one's elements
  int rows;        // from its row on, that are in the matrices

  __device__ Chunks(const KernelParams& p, int row, int col) {
    row += thread() / 8;
    col += thread() % 8 * 8;
    offset = row * p.gated.stride + col;
    rows = col < p.part[0].cols ? p.M - row : 0;
  }

  static __device__ int thread() { return threadIdx.x % kThreads; }
  static __device__ uint32_t in_box(int i) { return i * kRows * 128 + swizzled(thread() / 8, thread() % 8); }
  __device__ bool has(int i) const { return i * kRows < rows; }
  __device__ int64_t at(const KernelParams& p, int i) const { return offset + i * kRows * p.gated.stride; }
};

// The warps that gate. Boxes come from one warpgroup and the other in turn; gate and up of the next box are on their way from
// memory meanwhile.
template <typename C, typename T, Form kForm>
struct GateWarps {
  using Own = Chunks<C, kGateThreads>;
  using Does = Gate<C, T, kForm>;
  static constexpr int kBoxes = C::kTileCols / kBox * kConsumers;
  static constexpr int kTogether = 2;  // chunks, whose chains of instructions hide each other's latencies
  static_assert(Own::kCount == kGateAhead, "what lies ahead is a box");

  Shared<C>& shared;
  const KernelParams& p;
  const Does gate{p};
  uint32_t full_phase = 0;

  __device__ void run() {
    for (uint32_t phase = 0;; phase ^= 1) {
      ptx::mbarrier_wait(&shared.gate_tile_full, phase);
      const int2 first = shared.gate_tile;
      if (first.x < 0) return;
      tile(first.x, first.y);
    }
  }

  __device__ __forceinline__ void tile(int row, int col) {
    Own chunks(p, row, col);
#pragma unroll 1
    for (int i = 0; i < Own::kCount; i += kTogether) fetch(chunks, i);
#pragma unroll 1
    for (int n = 1; n <= kBoxes; ++n) {
      const int w = (n - 1) % kConsumers;
      const Own next(p, n == kBoxes ? p.M : row + n % kConsumers * kBox, col + n / kConsumers * kBox);
      ptx::mbarrier_wait(&shared.gate_full[w], full_phase);
      run_box(ptx::shared_address(shared.out[w]), chunks, next);
      ptx::mbarrier_arrive(&shared.gate_empty[w]);
      if (w + 1 == kConsumers) full_phase ^= 1;
      chunks = next;
    }
  }

  __device__ __forceinline__ void run_box(uint32_t box, const Own& chunks, const Own& next) {
#pragma unroll(kForm == Form::kFactors ? Own::kCount : 1)
    for (int i = 0; i < Own::kCount; i += kTogether) {
      uint4 v[kTogether][Does::kOperands], hidden[kTogether];
      if constexpr (C::kGateGrads) ptx::async_copies_wait<kGateAhead / kTogether - 1>();
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        v[t][0] = ptx::load_shared(box + Own::in_box(i + t));
        v[t][1] = ptx::load_shared(C::kGateGrads ? ahead(i + t, 0) : box + kBoxBytes + Own::in_box(i + t));
        if constexpr (C::kGateGrads) v[t][2] = ptx::load_shared(ahead(i + t, 1));
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) gate.turn(v[t], hidden[t]);
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (chunks.has(i + t)) gate.store(v[t], hidden[t], chunks.at(p, i + t));
      }
      fetch(next, i);
    }
  }

  // Each thread fetches what it reads itself.
  __device__ uint32_t ahead(int i, int which) const { return ptx::shared_address(&shared.gate_ahead[i][which][Own::thread()]); }
  __device__ __forceinline__ void fetch(const Own& chunks, int first) const {
    if constexpr (C::kGateGrads) {
#pragma unroll
      for (int i = first; i < first + kTogether; ++i) {
        if (!chunks.has(i)) continue;
        ptx::async_copy_16(ahead(i, 0), gate.at(p.gated.gate, chunks.at(p, i)));
        ptx::async_copy_16(ahead(i, 1), gate.at(p.gated.up, chunks.at(p, i)));
      }
      ptx::async_copies_commit();
    }
  }
};

}  // namespace fused_lora::sm90
