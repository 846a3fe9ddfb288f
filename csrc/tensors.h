// Between torch's tensors and the launchers' parameters.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace fused_lora {

inline DType dtype_of(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

// The ops of lora_linear.cpp; equations as in reference.py. Without a seed nothing is dropped; without dbias_dtype there is no
// dbias.
std::string lora_linear_obstacle(int64_t r);
std::tuple<at::Tensor, at::Tensor> lora_linear_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& A,
                                                       const at::Tensor& B, const std::optional<at::Tensor>& bias,
                                                       const at::Tensor& scale, const std::optional<at::Tensor>& seed, double p);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& xa, const at::Tensor& scale, const std::optional<at::Tensor>& seed, double p, bool need_dx, bool need_dA,
    bool need_dB, std::optional<at::ScalarType> dbias_dtype);
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> lora_group_forward(
    const at::Tensor& x, at::TensorList weights, at::TensorList As, at::TensorList Bs,
    const c10::List<std::optional<at::Tensor>>& biases, at::TensorList scales, const std::optional<at::Tensor>& seed, double p);
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_group_backward(
    at::TensorList dys, const at::Tensor& x, at::TensorList weights, at::TensorList As, at::TensorList Bs, at::TensorList xas,
    at::TensorList scales, const std::optional<at::Tensor>& seed, double p, bool need_dx, const c10::List<bool>& need_dA,
    const c10::List<bool>& need_dB, const c10::List<bool>& need_dbias, const std::vector<at::ScalarType>& bias_dtypes);
std::optional<at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
                                      const std::optional<at::Tensor>& bias, const at::Tensor& scale,
                                      const std::optional<at::Tensor>& seed, double p);

// The ops of lora_mlp.cpp: hidden = act(gate) up with both xa and, to keep, gate and up or with `factors` act(gate) and
// act'(gate) up; and the backward pass of down(hidden), which takes those where hidden is given, and otherwise gate and up.
std::string gated_obstacle(int64_t r);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_gated_forward(
    const at::Tensor& x, at::TensorList weights, at::TensorList As, at::TensorList Bs,
    const c10::List<std::optional<at::Tensor>>& biases, at::TensorList scales, const std::optional<at::Tensor>& seed, double p,
    double linear, double cubic, bool keep, bool factors);
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_mlp_backward(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& hidden, const at::Tensor& gate, const at::Tensor& up,
    at::TensorList weights, at::TensorList As, at::TensorList Bs, at::TensorList xas, at::TensorList scales,
    const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& down_seed, double p, bool need_dx,
    const c10::List<bool>& need_dA, const c10::List<bool>& need_dB, const c10::List<bool>& need_dbias,
    const std::vector<at::ScalarType>& bias_dtypes, double linear, double cubic);

}  // namespace fused_lora
