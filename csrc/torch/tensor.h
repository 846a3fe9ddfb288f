// The words for tensors in which the rest of this folder is written. Its sources are compiled for each version of torch that is
// known (full.h), with autograd in C++, and once for all others, against the ABI that torch keeps stable (stable.h).
#pragma once

// The ops' own: copies of this library that meet in one process need different ones.
#ifndef FUSED_LORA_NAMESPACE
#define FUSED_LORA_NAMESPACE fused_lora
#endif

#ifdef FUSED_LORA_STABLE_ABI
#include "stable.h"
#else
#include "full.h"
#endif

#include "../host/architecture.h"
#include "../host/check.h"
#include "../dtype.h"

namespace fused_lora {

inline DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: fail(name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

inline Tensor empty(Sizes sizes, const Tensor& like) { return empty(sizes, like, like.scalar_type()); }

// A tensor's device, as torch's current one and as this library's, and its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(guard_of(tensor)) { use_device(tensor.get_device()); }

 private:
  DeviceGuard guard_;
};

// Torch's current stream of a CUDA tensor's device.
cudaStream_t stream_of(const Tensor& tensor);

}  // namespace fused_lora
