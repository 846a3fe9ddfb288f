// Tensors of any version of torch, by way of its stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../host/check.h"

namespace fused_lora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Bools = std::vector<bool>;
using torch::stable::accelerator::DeviceGuard;

inline DeviceGuard guard_of(const Tensor& tensor) { return DeviceGuard(tensor.get_device_index()); }

// What torch says of an error does not come through this ABI. Of an allocation it is nearly always this one, in the words by which
// programs know it.
inline Tensor empty(Sizes sizes, const Tensor& like, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  const auto error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), number,
                                              aoti_torch_device_type_cuda(), like.get_device_index(), &made);
  check(error == 0, "CUDA out of memory. (Or torch's allocator failed otherwise: its stable ABI does not say.)");
  return Tensor(made);
}

inline Tensor reshaped(const Tensor& tensor, Sizes sizes) { return torch::stable::reshape(tensor, sizes); }
inline Tensor first_columns(const Tensor& matrix, int64_t cols) {
  Tensor all = matrix;
  return torch::stable::narrow(all, 1, 0, cols);
}
inline void copy_into(Tensor& to, const Tensor& from) { torch::stable::copy_(to, from); }
inline bool are_equal(Sizes one, Sizes other) { return std::equal(one.begin(), one.end(), other.begin(), other.end()); }
// Of one memory, seen alike: each entry of a list has a handle of its own.
inline bool are_same(const Tensor& one, const Tensor& other) {
  return one.data_ptr() == other.data_ptr() && one.scalar_type() == other.scalar_type() && are_equal(one.sizes(), other.sizes()) &&
         are_equal(one.strides(), other.strides());
}
inline int64_t bytes_of_element(const Tensor& tensor) { return static_cast<int64_t>(tensor.element_size()); }
inline int64_t bytes_of_storage(const Tensor& tensor) {
  int64_t bytes = 0;
  check(aoti_torch_get_storage_size(tensor.get(), &bytes) == 0, "a tensor has no storage");
  return bytes;
}

}  // namespace fused_lora

// A function as a kernel of an op.
#define FUSED_LORA_OP(function) TORCH_BOX(&function)
#define FUSED_LORA_OPS STABLE_TORCH_LIBRARY_FRAGMENT
#define FUSED_LORA_KERNELS_OF STABLE_TORCH_LIBRARY_IMPL
