// Parameters and launchers of the LoRA linear. Knows memory and streams, nothing of torch.
//
//   forward    xa  = scale x A^T      y  = x W^T + xa B^T + bias
//   backward   dxa = scale dy B       dx = dy W + dxa A       dA = dxa^T x       dB = dy^T xa
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace fused_lora {

// Rows are contiguous; stride, in elements, and pointer are multiples of 16 bytes.
struct Matrix {
  void* data;
  int64_t rows, cols, stride;
};

struct ForwardParams {
  Matrix x, weight, A, B, xa, y;
  const float* scale;  // on the device
  const void* bias;    // or null
  DType bias_dtype;
  DType dtype;  // of all matrices: float16 or bfloat16
  int* control;  // control_words() of zeros, which the kernel leaves as it found them
};

struct BackwardParams {
  Matrix dy, x, weight, A, B, xa, dxa, dx;
  void *dA, *dB;  // (r, K) and (N, r), contiguous; null where not wanted
  DType factor_dtype;  // of dA and dB
  bool needs_dx;
  const float* scale;
  DType dtype;
  int* control;
  float* partial;  // partial_floats()
};

// r at most 256; in_features and out_features multiples of 8.
cudaError_t launch_lora_linear_forward(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_lora_linear_backward(const BackwardParams& params, cudaStream_t stream);

int64_t control_words(int64_t M, int64_t K, int64_t N);
int64_t partial_floats(int64_t K, int64_t N, int64_t r);

}  // namespace fused_lora
