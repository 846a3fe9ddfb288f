// Tiles of gated passes on their way to memory: act(gate) up, or the gradients of gate and up.
#pragma once

#include "../gated.cuh"
#include "results.cuh"

namespace fused_lora::sm80 {

// Of one row, a lane's four words of 8 columns each become 8 columns side by side.
template <typename T, typename P>
__device__ __forceinline__ uint4 row_chunk(const Sums& of, int i, int j) {
  uint32_t words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float(&sums)[4] = P::of(of, i / 2, j + k);
    words[k] = pack<T>(sums[i % 2 * 2], sums[i % 2 * 2 + 1]);
  }
  transpose_quad(words);
  return {words[0], words[1], words[2], words[3]};
}

// 64 rows from `row` on: 32 columns of each of gate and up, which a warp's sums hold one behind the other; backward 64 of the
// gradient. Matrices of rows x cols.
template <typename T, typename P, bool kGrads, typename F>
__device__ __forceinline__ void gate_rows(const Sums& of, const Gated& gated, int row, int col, int rows, int cols) {
  const Gate<T, F, kGrads> gate{gated};
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * P::kRows; ++i) {
    const int own_row = row + i * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < (kGrads ? 2 * P::kCols : P::kCols); j += 4) {
      const int own_col = col + j * 8 + lane % 4 * 8;
      const int64_t at = int64_t{own_row} * gated.stride + own_col;
      const bool inside = own_row < rows && own_col < cols;
      typename Gate<T, F, kGrads>::Operands v;
      v[0] = row_chunk<T, P>(of, i, j);
      if constexpr (kGrads) {
        if (inside) {
          v[1] = __ldcg(gate.at(gated.gate, at));
          v[2] = __ldcg(gate.at(gated.up, at));
        }
      } else {
        v[1] = row_chunk<T, P>(of, i, P::kCols + j);
      }
      if (!inside) continue;
      uint4 hidden;
      gate.turn(v, hidden);
      gate.store(v, hidden, at);
    }
  }
}

}  // namespace fused_lora::sm80
