// The kernels of gated passes of lora_linear_forward.cu that mask x.
#include "launch.cuh"

namespace fused_lora::sm80 {

FUSED_LORA_LAUNCH_RANKS(, false, true, true);

}  // namespace fused_lora::sm80
