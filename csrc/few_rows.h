// Passes of so few rows that they are bound by reading weights: by torch's products, which spread a weight over all SMs where
// tiles of these kernels would be fewer.
#pragma once

#include "tensors.h"

namespace fused_lora {

// Whether torch's products take less time for (M, K) through parts, forward or backward; without dropout.
bool are_few_rows(int64_t M, const std::vector<Part>& parts, bool backward);

// The same of a linear in bfloat16.
bool are_few_rows(int64_t M, int64_t K, int64_t N, bool backward);

// lora_parts_forward and lora_parts_backward by them. gated is of a forward pass whose gate and up nobody wants.
std::vector<at::Tensor> few_rows_forward(const at::Tensor& x, const std::vector<Part>& parts, at::ArrayRef<double> act);
std::vector<at::Tensor> few_rows_backward(at::TensorList dys, const at::Tensor& x, const std::vector<Part>& parts, at::TensorList xas,
                                          bool need_dx, const c10::List<bool>& needs);

}  // namespace fused_lora
