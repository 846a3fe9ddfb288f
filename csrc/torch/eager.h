// Calls with autograd: a result, or none where a call is for others. Of one version of torch: its stable ABI has no autograd.
#pragma once

#include "parts.h"

namespace fused_lora {

// seed is of what the parts drop, in an MLP's down `down_seed` more.
std::optional<Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                                  const std::optional<Tensor>& bias, const Tensor& scale, const std::optional<Tensor>& seed, double p,
                                  const std::optional<Tensor>& gain);
std::optional<std::vector<Tensor>> lora_group(const Tensor& x, std::vector<Part> parts, const std::optional<Tensor>& seed, double p);
std::optional<Tensor> lora_mlp(const Tensor& x, std::vector<Part> parts, const std::optional<Tensor>& seed, int64_t down_seed, double p,
                               const std::vector<double>& act, bool saves_all);

}  // namespace fused_lora
