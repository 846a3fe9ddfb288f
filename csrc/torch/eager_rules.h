// Which calls go by C++, and who must see how they are computed.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include "parts.h"

namespace fused_lora {

// Whether its memory holds its values: not of a subclass (fake, distributed), whose memory is elsewhere.
bool is_memory(const Tensor& tensor);

// As in ops/autograd.py: who must see plain torch. An exporter traces, too. A mode (that counts, or saves by name) sees the ops
// of every backend.
bool watched();

// Whether a backward pass is to be differentiated itself, or is many at once: by the formula.
bool needs_formula(const torch::autograd::variable_list& dys);

// Whether the arguments are right beyond doubt and the kernels take them. Where not, the caller goes the long way, which finds
// the words for what is wrong, or another backend.
bool takes(const Tensor& x, const std::vector<Part>& parts, const std::optional<Tensor>& seed, double p, int64_t most_rank);

// Whether a part is right beyond doubt.
bool is_right(const Tensor& x, const Part& part);

}  // namespace fused_lora
