// Between torch's tensors and the launchers' parameters.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
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

// Tensors of parts one part after another, in the order of ops/parts.py: weight, A, B, bias, scale, seed.
using FlatParts = c10::List<std::optional<at::Tensor>>;

struct Part {
  static constexpr int kFields = 6;
  at::Tensor weight, A, B;
  std::optional<at::Tensor> bias;
  at::Tensor scale;
  std::optional<at::Tensor> seed;
};

// at(i) is the i-th of `size` tensors.
template <typename At>
std::vector<Part> unflatten(size_t size, At at) {
  TORCH_CHECK(size % Part::kFields == 0, "parts must be flat, of ", Part::kFields, " tensors each, got ", size);
  std::vector<Part> parts;
  for (size_t i = 0; i < size; i += Part::kFields) {
    parts.push_back({at(i).value(), at(i + 1).value(), at(i + 2).value(), at(i + 3), at(i + 4).value(), at(i + 5)});
  }
  return parts;
}

inline std::vector<Part> unflatten(const FlatParts& flat) {
  return unflatten(flat.size(), [&](size_t i) { return flat.get(i); });
}

// The pair of ops (lora_parts.cpp), as ops/lora_parts.py describes it. act is empty, or of a gated pass its two numbers.
std::vector<at::Tensor> lora_parts_forward(const at::Tensor& x, const FlatParts& parts, double p, at::ArrayRef<double> act,
                                           std::string_view keep);
std::vector<at::Tensor> lora_parts_backward(at::TensorList dys, at::TensorList xs, const FlatParts& parts, at::TensorList xas,
                                            const c10::List<std::optional<at::Tensor>>& dxas, double p, bool need_dx,
                                            const c10::List<bool>& needs, at::ArrayRef<double> act, at::TensorList gated,
                                            bool factors);

// Why the kernels, or their gated passes, do not take a rank; empty where they do.
std::string rank_obstacle(int64_t r);
std::string gated_obstacle(int64_t r);

// With autograd (eager.cpp), or none where a call is for others. seed is of what the parts drop, in an MLP's down `down_seed` more.
std::optional<at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
                                      const std::optional<at::Tensor>& bias, const at::Tensor& scale,
                                      const std::optional<at::Tensor>& seed, double p);
std::optional<std::vector<at::Tensor>> lora_group(const at::Tensor& x, std::vector<Part> parts, const std::optional<at::Tensor>& seed,
                                                  double p);
std::optional<at::Tensor> lora_mlp(const at::Tensor& x, std::vector<Part> parts, const std::optional<at::Tensor>& seed,
                                   int64_t down_seed, double p, const std::vector<double>& act, bool saves_all);

}  // namespace fused_lora
