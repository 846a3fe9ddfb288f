// Tensor maps: how the copy engine addresses a matrix in boxes.
#pragma once

#include <cuda.h>

#include "../lora_linear.h"

namespace fused_lora::sm90 {

// 64 x 64 elements of 16 bits: 64 rows of 128 bytes in shared memory, their 16-byte chunks permuted by the 128-byte swizzle.
constexpr int kBox = 64;
constexpr int kBoxBytes = kBox * kBox * 2;

// A map of the matrix in such boxes, or in ones of fewer rows. Outside the matrix it reads zeros and writes nothing.
cudaError_t make_tensor_map(const Operand& matrix, CUtensorMap* map, int box_rows);

}  // namespace fused_lora::sm90
