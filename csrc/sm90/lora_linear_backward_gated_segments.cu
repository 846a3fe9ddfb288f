// The kernels of lora_linear_backward.cu with the gradients of gate and up in their epilogue, of rows with adapters of their own.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_SEGMENTS(true, false, true);

}  // namespace fused_lora::sm90
