// Frozen weights in a format (fused_lora/formats), as kernels are given them.
#pragma once

#include <cstdint>

namespace fused_lora {

enum class Format : int8_t { kNone, kFp8, kInt8, kNf4, kNestedNf4 };

// W (N, K) as codes and scales, contiguous. The scale of W[n][k] in FP8 and INT8 is scale[(n >> row_shift) scale_stride + (k >> col_shift)].
struct Stored {
  Format format;  // kNone: it has 16 bits, and is an Operand
  const void* codes;
  const void* scale;   // float32; of nested NF4 8 bits
  const float* outer;  // of nested NF4
  int64_t cols;        // K
  int row_shift, col_shift;
  int64_t scale_stride;

  bool aligned;  // rows start at multiples of 8 codes and of NF4's blocks, and codes at a multiple of 8 bytes

#ifdef __CUDACC__
  __host__ __device__
#endif
  bool exists() const { return format != Format::kNone; }
};

}  // namespace fused_lora
