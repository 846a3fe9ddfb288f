// The kernels of gated passes of lora_linear_backward.cu.
#include "launch.cuh"

namespace fused_lora::sm80 {

FUSED_LORA_LAUNCH_RANKS(, true, false, true);

}  // namespace fused_lora::sm80
