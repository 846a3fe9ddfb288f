// The kernels of lora_linear_forward.cu whose weights are in a format.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_STORED(false, false, false);

}  // namespace fused_lora::sm90
