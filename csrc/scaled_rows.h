// gain W and gain B: a linear's matrices with their rows multiplied by its gain. Knows nothing of torch.
#pragma once

#include "lora_linear.h"

namespace fused_lora {

// to_weight (N, K) = gain weight, each row starting at a multiple of 16 bytes and readable to the end of its last 16 of them; to_B
// (N, r) = gain B, of float32 or to_B's format. Each number is rounded once. Without data to_weight is not wanted.
cudaError_t launch_scaled_rows(const float* gain, const Operand& weight, const Operand& B, const Operand& to_weight, const Operand& to_B,
                               cudaStream_t stream);

}  // namespace fused_lora
