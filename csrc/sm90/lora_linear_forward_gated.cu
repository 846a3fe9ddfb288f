// The kernels of lora_linear_forward.cu with act(gate) up in their epilogue.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_PASS(false, false, true);

}  // namespace fused_lora::sm90
