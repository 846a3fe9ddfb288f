// The only files that include torch: op schemas, checks, autograd and workspaces. No maths. This one: registration and the merge.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "architecture.h"
#include "few_rows.h"
#include "merge.h"
#include "tensors.h"

namespace py = pybind11;

namespace fused_lora {
namespace {

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
  TORCH_CHECK(factor_dtype == weight_dtype || factor_dtype == DType::kFloat32,
              "A must have weight's dtype or float32, got ", A.scalar_type());
  const c10::cuda::CUDAGuard guard(weight.device());
  const MergeParams params{weight.data_ptr(), A.data_ptr(),     B.data_ptr(),     scale.data_ptr<float>(), weight.size(0),
                           weight.size(1),    static_cast<int>(A.size(0)), weight.stride(0), A.stride(0), B.stride(0)};
  C10_CUDA_CHECK(launch_merge(params, weight_dtype, factor_dtype, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace fused_lora

TORCH_LIBRARY_FRAGMENT(fused_lora, m) {
  m.def("cuda_merge_(Tensor(a!) weight, Tensor A, Tensor B, Tensor scale) -> ()");
  // As those of ops/lora_parts.py, but that xas may have padded rows.
  m.def("cuda_lora_parts_forward(Tensor x, Tensor?[] parts, float p, float[] act, str keep) -> Tensor[]");
  m.def(
      "cuda_lora_parts_backward(Tensor[] dys, Tensor[] xs, Tensor?[] parts, Tensor[] xas, Tensor?[] dxas, float p, bool need_dx,"
      " bool[] needs, float[] act, Tensor[] gated, bool factors) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fused_lora, CUDA, m) {
  m.impl("cuda_merge_", &fused_lora::merge_);
  m.impl("cuda_lora_parts_forward", &fused_lora::lora_parts_forward);
  m.impl("cuda_lora_parts_backward", &fused_lora::lora_parts_backward);
}

namespace {

std::tuple<int, int, int> tile(int64_t M, int64_t N, int64_t r) {
  const fused_lora::Card card = fused_lora::current_card();
  const fused_lora::work::Pass pass{M, false, false, true, false, 1, 1, {{N, N, r, false, false}}};
  const fused_lora::Tile found = fused_lora::kernels_of(card)->tile_of(pass, card);
  return {found.M, found.N, found.K};
}

using Flat = std::vector<std::optional<at::Tensor>>;

std::vector<fused_lora::Part> unflatten(const Flat& flat) {
  return fused_lora::unflatten(flat.size(), [&](size_t i) { return flat[i]; });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("rank_obstacle", &fused_lora::rank_obstacle, "Why the kernels do not take a rank, in words; empty where they do.");
  m.def("gated_obstacle", &fused_lora::gated_obstacle, "The same of gated passes.");
  m.def("are_few_rows", py::overload_cast<int64_t, int64_t, int64_t, bool>(&fused_lora::are_few_rows),
        "Whether torch's products take a pass (M, K, N, backward) on the current device.");
  m.def("lora_linear", &fused_lora::lora_linear, py::call_guard<py::gil_scoped_release>(),
        "lora_linear with autograd, or None where it is for others. Plain tensors on a GPU; p is a float.");
  m.def(
      "lora_group",
      [](const at::Tensor& x, const Flat& parts, const std::optional<at::Tensor>& seed, double p) {
        return fused_lora::lora_group(x, unflatten(parts), seed, p);
      },
      py::call_guard<py::gil_scoped_release>(), "lora_group of flat parts, likewise.");
  m.def(
      "lora_mlp",
      [](const at::Tensor& x, const Flat& parts, const std::optional<at::Tensor>& seed, int64_t down_seed, double p,
         const std::vector<double>& act, bool saves_all) {
        return fused_lora::lora_mlp(x, unflatten(parts), seed, down_seed, p, act, saves_all);
      },
      py::call_guard<py::gil_scoped_release>(), "lora_mlp of the flat parts of gate, up and down, likewise.");
  m.def("tile", &tile, "BLOCK_M, BLOCK_N and BLOCK_K of an (M, N) result on the current device.");
  m.def("play_as", &fused_lora::play_as, "Compute capability 80 or 86: whose kernels later cards run from now on; 0: their own.");
}
