// Copies of matrices whose rows start anywhere, with rows that start at multiples of 16 bytes. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fused_lora {

// to (rows, cols) = from, elements of 16 bits, rows contiguous, strides in elements. Between to's rows nothing is written.
cudaError_t launch_fill_up(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t cols,
                           cudaStream_t stream);

}  // namespace fused_lora
