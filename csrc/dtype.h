// The dtypes that kernels read and write.
#pragma once

namespace fused_lora {

enum class DType { kFloat32, kFloat16, kBFloat16 };

}  // namespace fused_lora
