// The kernels of lora_linear_forward_gated.cu that mask x.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_PASS(false, true, true);

}  // namespace fused_lora::sm90
