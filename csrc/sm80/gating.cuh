// Tiles of gated passes on their way to memory: act(gate) up, or the gradients of gate and up.
#pragma once

#include "../gated.cuh"
#include "results.cuh"

namespace fused_lora::sm80 {

// 64 rows from `row` on: 32 columns of each of gate and up, which a warp's sums hold one behind the other; backward 64 of the
// gradient. Matrices of rows x cols.
template <typename T, typename P, bool kGrads, typename F>
__device__ __forceinline__ void gate_rows(const Sums& of, uint32_t memory, const Gated& gated, int row, int col, int rows, int cols) {
  using Own = Slab<T, P>;
  constexpr int kChunks = kGrads ? Own::kChunks : Own::kChunks / 2, kAtOnce = 32 / kChunks;
  const Own slab(memory);
  const Gate<T, F, kGrads> gate{gated};
  const int lane = threadIdx.x % 32, chunk = lane % kChunks, own_col = col + chunk * 8;
#pragma unroll
  for (int first = 0; first < 16 * P::kRows; first += Own::kRows) {
    slab.put(of, first);
#pragma unroll
    for (int i = lane / kChunks; i < Own::kRows; i += kAtOnce) {
      const int own_row = row + first + i;
      if (own_row >= rows || own_col >= cols) continue;
      const int64_t at = int64_t{own_row} * gated.stride + own_col;
      typename Gate<T, F, kGrads>::Operands v;
      v[0] = slab.chunk(i, chunk);
      if constexpr (kGrads) {
        v[1] = __ldcg(gate.at(gated.gate, at));
        v[2] = __ldcg(gate.at(gated.up, at));
      } else {
        v[1] = slab.chunk(i, chunk + kChunks);
      }
      uint4 hidden;
      gate.turn(v, hidden);
      gate.store(v, hidden, at);
    }
  }
}

}  // namespace fused_lora::sm80
