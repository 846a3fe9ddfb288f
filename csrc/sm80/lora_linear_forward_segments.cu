#include "launch.cuh"

namespace fused_lora::sm80 {

FUSED_LORA_LAUNCH_SEGMENTS(false);

}  // namespace fused_lora::sm80
