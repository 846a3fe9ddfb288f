// The passes as autograd in C++ calls them.
#pragma once

#include "parts.h"

namespace fused_lora {

// The passes by themselves, under the names of their ops, and with x and matrices for inputs, in a profile.
std::vector<Tensor> shown_forward(const Tensor& x, const std::vector<Part>& parts, double p, const std::vector<double>& act = {},
                                  const std::string& keep = "none");
// As an op for modes and tensors that watch ops, and for what torch has to make memory of.
std::vector<Tensor> shown_backward(const BackwardPass& pass);

// A backward pass by the formula in plain torch (ops/autograd.py), so that it can be differentiated itself: dx, dAs, dBs, dbiases
// and dgains.
std::vector<Tensor> backward_by_formula(at::TensorList dys, const Tensor& x, const std::vector<Part>& parts, double p,
                                        at::ArrayRef<double> act, bool need_dx, const std::vector<bool>& needs);

}  // namespace fused_lora
