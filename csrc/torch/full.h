// Tensors of one version of torch.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace fused_lora {

using at::ScalarType;
using at::Tensor;
using Sizes = at::IntArrayRef;
using Bools = c10::List<bool>;
using c10::DeviceGuard;

inline DeviceGuard guard_of(const Tensor& tensor) { return DeviceGuard(tensor.device()); }

inline Tensor empty(Sizes sizes, const Tensor& like, ScalarType dtype) { return at::empty(sizes, like.options().dtype(dtype)); }
inline Tensor reshaped(const Tensor& tensor, Sizes sizes) { return tensor.reshape(sizes); }
inline Tensor first_columns(const Tensor& matrix, int64_t cols) { return matrix.narrow(1, 0, cols); }
inline void copy_into(Tensor& to, const Tensor& from) { to.copy_(from); }
inline bool are_same(const Tensor& one, const Tensor& other) { return one.is_same(other); }
inline int64_t bytes_of_element(const Tensor& tensor) { return static_cast<int64_t>(tensor.itemsize()); }
inline int64_t bytes_of_storage(const Tensor& tensor) { return static_cast<int64_t>(tensor.storage().nbytes()); }

}  // namespace fused_lora

// A function as a kernel of an op.
#define FUSED_LORA_OP(function) &function
#define FUSED_LORA_OPS TORCH_LIBRARY_FRAGMENT
#define FUSED_LORA_KERNELS_OF TORCH_LIBRARY_IMPL
