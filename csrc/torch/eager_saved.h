// What autograd in C++ keeps of a forward pass for its backward pass.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "parts.h"

namespace fused_lora {

// The result, where a gain's gradient is made of it.
Tensor read_result(const Part& part, const Tensor& y);

// The same tensors in the same order as ops/autograd.py and ops/lora_mlp.py save: a checkpoint, which counts them, may go by the one
// way first and by the other then. `saved` comes before the parts'; of biases all is saved, or what a linear's backward reads.
void save_parts(torch::autograd::AutogradContext* context, torch::autograd::variable_list& saved, const std::vector<Part>& parts,
                double p, bool biases);

std::vector<Part> saved_parts(const torch::autograd::variable_list& saved, size_t first);
double saved_p(torch::autograd::AutogradContext* context);

// Which parts have a bias, and a gain; two bits a part.
struct Present {
  int64_t bits = 0;
  bool bias(size_t part) const { return (bits >> 2 * part & 1) != 0; }
  bool gain(size_t part) const { return (bits >> 2 * part & 2) != 0; }
};
Present saved_present(torch::autograd::AutogradContext* context);

}  // namespace fused_lora
