// The kernels of lora_linear_backward.cu whose rows have adapters of their own.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_SEGMENTS(true, false, false);

}  // namespace fused_lora::sm90
