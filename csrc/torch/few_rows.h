// Passes of so few rows that they are bound by reading weights: by torch's products, which spread a weight over all SMs where
// tiles of these kernels would be fewer.
#pragma once

#include "parts.h"

namespace fused_lora {

#ifdef FUSED_LORA_STABLE_ABI

// Torch's products by name take the host what they would save.
inline bool are_few_rows(int64_t, const std::vector<Part>&, bool) { return false; }
inline bool are_few_rows(int64_t, int64_t, int64_t, bool) { return false; }

#else

// Whether torch's products take less time for (M, K) through parts, forward or backward; without dropout.
bool are_few_rows(int64_t M, const std::vector<Part>& parts, bool backward);

// The same of a linear in bfloat16.
bool are_few_rows(int64_t M, int64_t K, int64_t N, bool backward);

#endif

// lora_parts_forward and lora_parts_backward by them. gated is of a forward pass whose gate and up nobody wants.
std::vector<Tensor> few_rows_forward(const Tensor& x, const std::vector<Part>& parts, const std::vector<double>& act);
std::vector<Tensor> few_rows_backward(const std::vector<Tensor>& dys, const Tensor& x, const std::vector<Part>& parts,
                                      const std::vector<Tensor>& xas, bool need_dx, const std::vector<bool>& needs);

}  // namespace fused_lora
