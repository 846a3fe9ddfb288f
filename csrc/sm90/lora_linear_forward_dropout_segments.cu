// The kernels of lora_linear_forward.cu with dropout, of rows with adapters of their own.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_SEGMENTS(false, true, false);

}  // namespace fused_lora::sm90
