// The kernels of lora_linear_forward.cu with act(gate) up in their epilogue, of rows with adapters of their own.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_SEGMENTS(false, false, true);

}  // namespace fused_lora::sm90
