#include "launch.cuh"

namespace fused_lora::sm80 {

FUSED_LORA_LAUNCH_SEGMENTS(true);

}  // namespace fused_lora::sm80
