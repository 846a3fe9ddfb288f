// The kernels of lora_linear_backward_gated.cu that mask x.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_PASS(true, true, true);

}  // namespace fused_lora::sm90
