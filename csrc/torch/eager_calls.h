// Python's way to calls with autograd (eager.h).
#pragma once

#include "guarded.h"

namespace fused_lora {

// lora_linear, lora_group and lora_mlp, ended by an empty one.
PyMethodDef* eager_calls();

// From now on torch's allocator gives up what it keeps unused where the kernels' own memory does not fit.
void give_up_torchs_memory_when_short();

}  // namespace fused_lora
