// The ops that Python calls, which have no autograd of their own.
#include "../merge.h"
#include "parts.h"

namespace fused_lora {
namespace {

void check_rows(const char* name, const Tensor& tensor, const Tensor& weight) {
  check(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  check(tensor.is_cuda() && tensor.get_device() == weight.get_device(), name, " must be on weight's device");
  check(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, " must have contiguous rows");
}

void merge_(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scale) {
  check_rows("weight", weight, weight);
  check_rows("A", A, weight);
  check_rows("B", B, weight);
  check(A.size(1) == weight.size(1), "A must have ", weight.size(1), " columns, got ", A.size(1));
  check(B.size(0) == weight.size(0) && B.size(1) == A.size(0), "B must be (", weight.size(0), ", ", A.size(0), ")");
  check(scale.is_cuda() && scale.scalar_type() == ScalarType::Float && scale.numel() == 1, "scale must be one float32 on the device");
  const auto weight_dtype = dtype_of("weight", weight), factor_dtype = dtype_of("A", A);
  check(B.scalar_type() == A.scalar_type(), "B must have A's dtype, got ", B.scalar_type());
  check(factor_dtype == weight_dtype || factor_dtype == DType::kFloat32, "A must have weight's dtype or float32, got ",
        A.scalar_type());
  const OnDevice here(weight);
  const MergeParams params{.weight = weight.data_ptr(),
                           .A = A.data_ptr(),
                           .B = B.data_ptr(),
                           .scale = static_cast<const float*>(scale.data_ptr()),
                           .N = weight.size(0),
                           .K = weight.size(1),
                           .r = static_cast<int>(A.size(0)),
                           .stride_weight = weight.stride(0),
                           .stride_A = A.stride(0),
                           .stride_B = B.stride(0)};
  check_cuda(launch_merge(params, weight_dtype, factor_dtype, stream_of(weight)));
}

// Of each part three, with dropout four; or none.
using Tables = std::optional<std::vector<Tensor>>;

Routing routing_of(Tables tables, int64_t window, size_t parts) {
  if (!tables) return {};
  const size_t of_part = tables->size() / std::max<size_t>(parts, 1);
  return {std::move(*tables), window, of_part};
}

std::vector<Tensor> forward(const Tensor& x, FlatParts parts, double p, std::vector<double> act, std::string keep, Tables tables,
                            int64_t window) {
  return lora_parts_forward(x, unflatten(parts), p, act, keep, routing_of(std::move(tables), window, parts.size() / Part::kFields));
}

std::vector<Tensor> backward(std::vector<Tensor> dys, std::vector<Tensor> xs, FlatParts parts, std::vector<Tensor> xas,
                             std::vector<std::optional<Tensor>> dxas, double p, bool need_dx, Bools needs,
                             std::vector<double> act, std::vector<Tensor> gated, bool factors, std::vector<std::optional<Tensor>> ys,
                             Tables tables, int64_t window) {
  return lora_parts_backward({std::move(dys), std::move(xs), unflatten(parts), std::move(xas), std::move(dxas), p, need_dx,
                              {needs.begin(), needs.end()}, std::move(act), std::move(gated), factors, std::move(ys),
                              routing_of(std::move(tables), window, parts.size() / Part::kFields)});
}

}  // namespace
}  // namespace fused_lora

FUSED_LORA_OPS(FUSED_LORA_NAMESPACE, m) {
  m.def("cuda_merge_(Tensor(a!) weight, Tensor A, Tensor B, Tensor scale) -> ()");
  // As those of ops/lora_parts.py, but that xas may have padded rows. With tables, B is the slab of B^T, dB is of it, and xas and dxas
  // are in boxes (work/segments.h).
  m.def(
      "cuda_lora_parts_forward(Tensor x, Tensor?[] parts, float p, float[] act, str keep, Tensor[]? tables=None, int window=0)"
      " -> Tensor[]");
  m.def(
      "cuda_lora_parts_backward(Tensor[] dys, Tensor[] xs, Tensor?[] parts, Tensor[] xas, Tensor?[] dxas, float p, bool need_dx,"
      " bool[] needs, float[] act, Tensor[] gated, bool factors, Tensor?[] ys, Tensor[]? tables=None, int window=0) -> Tensor[]");
}

FUSED_LORA_KERNELS_OF(FUSED_LORA_NAMESPACE, CUDA, m) {
  m.impl("cuda_merge_", FUSED_LORA_OP(fused_lora::merge_));
  m.impl("cuda_lora_parts_forward", FUSED_LORA_OP(fused_lora::forward));
  m.impl("cuda_lora_parts_backward", FUSED_LORA_OP(fused_lora::backward));
}
