// The only file that includes torch: op schemas and checks. No maths.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <pybind11/pybind11.h>

#include "merge.h"

namespace {

fused_lora::DType dtype_of(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return fused_lora::DType::kFloat32;
    case at::kHalf: return fused_lora::DType::kFloat16;
    case at::kBFloat16: return fused_lora::DType::kBFloat16;
    default: TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

void check_rows(const char* name, const at::Tensor& tensor, const at::Tensor& weight) {
  TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  TORCH_CHECK(tensor.device() == weight.device(), name, " must be on ", weight.device(), ", got ", tensor.device());
  TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, " must have contiguous rows");
}

void merge_(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B, const at::Tensor& scale) {
  check_rows("weight", weight, weight);
  check_rows("A", A, weight);
  check_rows("B", B, weight);
  TORCH_CHECK(A.size(1) == weight.size(1), "A must have ", weight.size(1), " columns, got ", A.size(1));
  TORCH_CHECK(B.size(0) == weight.size(0) && B.size(1) == A.size(0), "B must be (", weight.size(0), ", ", A.size(0), ")");
  TORCH_CHECK(scale.is_cuda() && scale.scalar_type() == at::kFloat && scale.numel() == 1,
              "scale must be one float32 on the device");
  const auto weight_dtype = dtype_of("weight", weight), factor_dtype = dtype_of("A", A);
  TORCH_CHECK(B.scalar_type() == A.scalar_type(), "B must have A's dtype, got ", B.scalar_type());
  TORCH_CHECK(factor_dtype == weight_dtype || factor_dtype == fused_lora::DType::kFloat32,
              "A must have weight's dtype or float32, got ", A.scalar_type());
  const c10::cuda::CUDAGuard guard(weight.device());
  const fused_lora::MergeParams params{
      weight.data_ptr(), A.data_ptr(),     B.data_ptr(),     scale.data_ptr<float>(), weight.size(0),
      weight.size(1),    static_cast<int>(A.size(0)), weight.stride(0), A.stride(0), B.stride(0)};
  C10_CUDA_CHECK(fused_lora::launch_merge(params, weight_dtype, factor_dtype, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_lora, m) {
  m.def("cuda_merge_(Tensor(a!) weight, Tensor A, Tensor B, Tensor scale) -> ()");
}

TORCH_LIBRARY_IMPL(fused_lora, CUDA, m) { m.impl("cuda_merge_", &merge_); }

PYBIND11_MODULE(_C, m) { m.attr("cuda_version") = CUDART_VERSION; }
