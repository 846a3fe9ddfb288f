// Operands in shared memory as the tensor cores are told of them.
#pragma once

#include "../elements.cuh"
#include "../ptx/wgmma.cuh"
#include "tensor_map.h"

namespace fused_lora::sm90 {

constexpr int kSlices = kBox / 16;  // of the summed index, in a box

// Where the 128-byte swizzle has the 16-byte chunk `chunk` of a box's row.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ row % 8) << 4); }

// An operand in boxes: K-major ones are stacked along M or N, MN-major ones lie side by side along it.
template <bool kMN>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 8 * 128, kNextBox = kMN ? kBoxBytes : 16;
  return kSwizzle128 << 62 | (kEightRows >> 4) << 32 | (kNextBox >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
// From one slice to the next: 16 elements of a row, or 16 rows.
template <bool kMN>
constexpr uint64_t kSlice = (kMN ? 16 * 128 : 16 * 2) >> 4;

}  // namespace fused_lora::sm90
