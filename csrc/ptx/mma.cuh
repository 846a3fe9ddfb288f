// Tensor cores of compute capability 8: matrices of 8 x 8 from shared memory, and products of 16 x 8 x 16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fused_lora::ptx {

// Four matrices; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&matrices)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row_address));
}

// The same with each matrix transposed.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&matrices)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row_address));
}

// sums += lhs (16, 16) rhs (16, 8).
template <typename T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&lhs)[4], uint32_t rhs0, uint32_t rhs1);

#define FUSED_LORA_MMA(T, name)                                                                                          \
  template <>                                                                                                            \
  __device__ __forceinline__ void mma<T>(float (&sums)[4], const uint32_t (&lhs)[4], uint32_t rhs0, uint32_t rhs1) {     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                  \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                            \
                 : "r"(lhs[0]), "r"(lhs[1]), "r"(lhs[2]), "r"(lhs[3]), "r"(rhs0), "r"(rhs1));                            \
  }
FUSED_LORA_MMA(__nv_bfloat16, "bf16")
FUSED_LORA_MMA(__half, "f16")
#undef FUSED_LORA_MMA

}  // namespace fused_lora::ptx
