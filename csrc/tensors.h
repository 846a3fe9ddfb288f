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

inline std::vector<Part> unflatten(const FlatParts& flat) {
  TORCH_CHECK(flat.size() % Part::kFields == 0, "parts must be flat, of ", Part::kFields, " tensors each, got ", flat.size());
  std::vector<Part> parts;
  for (size_t i = 0; i < flat.size(); i += Part::kFields) {
    parts.push_back({flat.get(i).value(), flat.get(i + 1).value(), flat.get(i + 2).value(), flat.get(i + 3), flat.get(i + 4).value(),
                     flat.get(i + 5)});
  }
  return parts;
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

// One part with autograd (eager.cpp), or none where it is for others.
std::optional<at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
                                      const std::optional<at::Tensor>& bias, const at::Tensor& scale,
                                      const std::optional<at::Tensor>& seed, double p);

}  // namespace fused_lora
