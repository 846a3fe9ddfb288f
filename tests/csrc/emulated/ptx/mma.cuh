// What ldmatrix and mma.sync do, lane by lane.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "../simt.h"
namespace fused_lora::ptx {

// Lane i gets elements 2 (i % 4) and the next of row i / 4 of each of four matrices; transposed, of column i / 4.
inline void load_matrices(uint32_t (&matrices)[4], uint32_t address, bool transposed) {
  const int lane = simt::lane();
  uint32_t(&rows)[simt::kWarp] = simt::warp().words;
  rows[lane] = address;
  simt::meet_warp();
  for (int q = 0; q < 4; ++q) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int row = transposed ? lane % 4 * 2 + k : lane / 4, col = transposed ? lane / 4 : lane % 4 * 2 + k;
      std::memcpy(&pair[k], simt::shared_memory() + rows[8 * q + row] + 2 * col, 2);
    }
    matrices[q] = pair[0] | pair[1] << 16;
  }
  simt::meet_warp();
}
inline void ldmatrix(uint32_t (&matrices)[4], uint32_t address) { load_matrices(matrices, address, false); }
inline void ldmatrix_transposed(uint32_t (&matrices)[4], uint32_t address) { load_matrices(matrices, address, true); }

template <typename T>
float number(uint32_t word, int half) {
  const uint16_t bits = word >> (16 * half);
  T value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

template <typename T>
void mma(float (&sums)[4], const uint32_t (&lhs)[4], uint32_t rhs0, uint32_t rhs1) {
  float(&a)[16][16] = simt::warp().lhs, (&b)[16][8] = simt::warp().rhs;
  const int lane = simt::lane(), row = lane / 4, col = lane % 4 * 2;
  for (int half = 0; half < 2; ++half) {
    for (int q = 0; q < 4; ++q) a[row + q % 2 * 8][col + half + q / 2 * 8] = number<T>(lhs[q], half);
    b[col + half][row] = number<T>(rhs0, half);
    b[col + half + 8][row] = number<T>(rhs1, half);
  }
  simt::meet_warp();
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) sums[i] += a[row + i / 2 * 8][k] * b[k][col + i % 2];
  }
  simt::meet_warp();
}

}  // namespace fused_lora::ptx
