// Parameters and launcher of the merge kernel. Knows memory and streams, nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace fused_lora {

// weight (N, K) += scale * B (N, r) @ A (r, K). Rows are contiguous; strides are in elements; scale is one float on the device.
struct MergeParams {
  void* weight;
  const void* A;
  const void* B;
  const float* scale;
  int64_t N, K;
  int r;
  int64_t stride_weight, stride_A, stride_B;
};

// A and B share factor_dtype, which is weight_dtype or float32.
cudaError_t launch_merge(const MergeParams& params, DType weight_dtype, DType factor_dtype, cudaStream_t stream);

}  // namespace fused_lora
