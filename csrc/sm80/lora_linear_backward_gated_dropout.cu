// The kernels of gated passes of lora_linear_backward.cu that mask x.
#include "launch.cuh"

namespace fused_lora::sm80 {

FUSED_LORA_LAUNCH_RANKS(, true, true, true);

}  // namespace fused_lora::sm80
