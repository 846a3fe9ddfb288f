// The kernels of lora_linear_forward.cu whose rows have adapters of their own.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_SEGMENTS(false, false, false);

}  // namespace fused_lora::sm90
