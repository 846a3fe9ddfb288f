#include "eager_rules.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "operands.h"

namespace fused_lora {
namespace {

bool is_16_bit(const Tensor& tensor) { return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16; }

bool is_factor_dtype(const Tensor& factor, const Tensor& x) {
  return factor.scalar_type() == x.scalar_type() || factor.scalar_type() == at::kFloat;
}

bool is_plain(const Tensor& tensor, const Tensor& x) {
  return tensor.layout() == at::kStrided && tensor.device() == x.device() && is_memory(tensor);
}

// Whether the card and FUSED_LORA_BACKEND leave a call to these kernels: the rule is backends.py's, the question every call's.
bool chosen(const Tensor& x) {
  const char* forced = std::getenv("FUSED_LORA_BACKEND");
  if (forced != nullptr && std::strcmp(forced, "auto") != 0 && std::strcmp(forced, "cuda") != 0) return false;
  return kernels_of(card_of(x.get_device())) != nullptr;
}

// Whether a gradient is many at once, of torch.func.vmap or of is_grads_batched.
bool is_many(const Tensor& dy) {
  return dy.defined() && (dy.key_set().has(c10::DispatchKey::FuncTorchBatched) || dy.key_set().has(c10::DispatchKey::Batched));
}

}  // namespace

bool is_memory(const Tensor& tensor) {
  return !tensor.key_set().has(c10::DispatchKey::Python) && !tensor.is_neg() && !tensor._is_zerotensor();
}

bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || torch::jit::tracer::isTracing();
}

bool needs_formula(const torch::autograd::variable_list& dys) {
  return at::GradMode::is_enabled() || std::any_of(dys.begin(), dys.end(), is_many);
}

bool takes(const Tensor& x, const std::vector<Part>& parts, const std::optional<Tensor>& seed, double p, int64_t most_rank) {
  if (!x.is_cuda() || !is_plain(x, x) || !is_16_bit(x) || x.dim() == 0 || x.numel() == 0) return false;
  if (parts.empty() || parts.size() > kMostParts || !chosen(x) || watched() || !(p >= 0 && p <= 1)) return false;
  if (seed && (!is_plain(*seed, x) || seed->scalar_type() != at::kLong || seed->dim() != 0)) return false;
  if (have_gains(parts) && card_of(x.get_device()).capability != 90) return false;
  for (const Part& part : parts) {
    if (part.A.dim() != 2 || part.A.size(0) > most_rank || part.A.scalar_type() != parts[0].A.scalar_type()) return false;
  }
  return x.numel() / x.size(-1) < kMostRows;
}

bool is_right(const Tensor& x, const Part& part) {
  const auto& [weight, A, B, bias, scale, seed, gain, weight_scale, weight_outer] = part;
  if (part.stored()) return false;
  if (weight.dim() != 2 || A.dim() != 2 || B.dim() != 2) return false;
  const int64_t K = weight.size(1), N = weight.size(0), r = A.size(0);
  if (N == 0 || r == 0 || std::max(N, K) > kMostStride || x.size(-1) != K || A.size(1) != K || B.size(0) != N || B.size(1) != r) return false;
  if (weight.scalar_type() != x.scalar_type() || !is_factor_dtype(A, x) || B.scalar_type() != A.scalar_type()) return false;
  for (const Tensor* tensor : {&weight, &A, &B, &scale}) {
    if (!is_plain(*tensor, x)) return false;
  }
  if (scale.scalar_type() != at::kFloat || scale.numel() != 1 || scale.requires_grad()) return false;
  if (bias && (bias->dim() != 1 || bias->size(0) != N || !is_plain(*bias, x) || bias->stride(0) != 1)) return false;
  if (bias && !is_16_bit(*bias) && bias->scalar_type() != at::kFloat) return false;
  if (gain && (gain->dim() != 1 || gain->size(0) != N || !is_plain(*gain, x) || gain->stride(0) != 1)) return false;
  if (gain && gain->scalar_type() != at::kFloat) return false;
  if (weight.requires_grad() && at::GradMode::is_enabled()) return false;
  return weight.stride(1) == 1;
}

}  // namespace fused_lora
