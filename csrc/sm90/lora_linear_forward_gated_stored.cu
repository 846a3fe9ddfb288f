// The kernels of lora_linear_forward_gated.cu whose weights are in a format.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_STORED(false, false, true);

}  // namespace fused_lora::sm90
