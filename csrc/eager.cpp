// One part as an autograd function in C++, which costs a call half of what one in Python does.
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <cstdlib>
#include <cstring>

#include "operands.h"

namespace fused_lora {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool is_16_bit(const Tensor& tensor) { return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16; }

bool is_factor_dtype(const Tensor& factor, const Tensor& x) {
  return factor.scalar_type() == x.scalar_type() || factor.scalar_type() == at::kFloat;
}

// No subclass (fake, distributed) either, whose memory is not here.
bool is_plain(const Tensor& tensor, const Tensor& x) {
  return tensor.layout() == at::kStrided && tensor.device() == x.device() && !tensor.key_set().has(c10::DispatchKey::Python);
}

// Whether the card and FUSED_LORA_BACKEND leave a call to these kernels: the rule is backends.py's, the question every call's.
bool chosen(const Tensor& x) {
  const char* forced = std::getenv("FUSED_LORA_BACKEND");
  if (forced != nullptr && std::strcmp(forced, "auto") != 0 && std::strcmp(forced, "cuda") != 0) return false;
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device()));
  return major == 9 && minor == 0;
}

// As in ops/autograd.py: who must see plain torch. An exporter traces, too. A mode (that counts, or saves by name) sees the ops
// of every backend.
bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || torch::jit::tracer::isTracing();
}

// Whether the arguments are right beyond doubt and the kernels take them. Where not, the caller goes the long way, which finds
// the words for what is wrong, or another backend.
bool takes(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias,
           const Tensor& scale, const std::optional<Tensor>& seed, double p) {
  if (!x.is_cuda() || !is_plain(x, x) || !is_16_bit(x) || x.dim() == 0 || x.numel() == 0) return false;
  if (!chosen(x) || watched()) return false;
  if (weight.dim() != 2 || A.dim() != 2 || B.dim() != 2) return false;
  const int64_t K = weight.size(1), N = weight.size(0), r = A.size(0);
  if (N == 0 || r == 0) return false;
  if (x.size(-1) != K || A.size(1) != K || B.size(0) != N || B.size(1) != r) return false;
  if (weight.scalar_type() != x.scalar_type() || !is_factor_dtype(A, x) || B.scalar_type() != A.scalar_type()) return false;
  for (const Tensor* tensor : {&weight, &A, &B, &scale}) {
    if (!is_plain(*tensor, x)) return false;
  }
  if (scale.scalar_type() != at::kFloat || scale.numel() != 1 || scale.requires_grad()) return false;
  if (bias && (bias->dim() != 1 || bias->size(0) != N || !is_plain(*bias, x) || bias->stride(0) != 1)) return false;
  if (bias && !is_16_bit(*bias) && bias->scalar_type() != at::kFloat) return false;
  if (!(p >= 0 && p <= 1)) return false;
  if (seed && (!is_plain(*seed, x) || seed->scalar_type() != at::kLong || seed->dim() != 0)) return false;
  if (weight.requires_grad() && at::GradMode::is_enabled()) return false;
  return rank_obstacle(r).empty() && weight.stride(1) == 1 && x.numel() / K < kMostRows;
}

// Whether a gradient is many at once, of torch.func.vmap or of is_grads_batched.
bool is_many(const Tensor& dy) {
  return dy.key_set().has(c10::DispatchKey::FuncTorchBatched) || dy.key_set().has(c10::DispatchKey::Batched);
}

FlatParts flat_part(const Tensor& weight, const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias, const Tensor& scale,
                    const std::optional<Tensor>& seed) {
  return FlatParts({weight, A, B, bias, scale, seed});
}

class LoRALinear : public torch::autograd::Function<LoRALinear> {
 public:
  // What may be absent comes last: it has no edge then, and needs_input_grad counts edges.
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                        const Tensor& scale, const std::optional<Tensor>& seed, double p, const std::optional<Tensor>& bias) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_lora::cuda_lora_parts_forward", "")
                               .typed<decltype(lora_parts_forward)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor rows = rows_of(x), read = rows.is_alias_of(x) ? x : rows.view(x.sizes());  // a copy serves both passes
    const auto y_and_xa = op.call(read, flat_part(weight, A, B, bias, scale, seed), p, {}, "none");
    context->save_for_backward({read, weight, A, B, y_and_xa[1], scale, seed.value_or(Tensor())});
    if (seed) context->saved_data["p"] = p;
    if (bias) context->saved_data["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
    return y_and_xa[0];
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto of_bias = context->saved_data.find("bias_dtype");
    // Edges are those of tensors: x, weight, A, B, scale, then seed and bias where they are.
    const bool has_seed = saved[6].defined(), has_bias = of_bias != context->saved_data.end();
    const bool need_dx = context->needs_input_grad(0), need_dA = context->needs_input_grad(2),
               need_dB = context->needs_input_grad(3), need_dbias = has_bias && context->needs_input_grad(has_seed ? 6 : 5);
    variable_list result(8);
    if (!(need_dx || need_dA || need_dB || need_dbias)) return result;
    std::optional<Tensor> like_bias;
    if (need_dbias) like_bias = at::empty({0}, saved[0].options().dtype(static_cast<at::ScalarType>(of_bias->second.toInt())));
    const auto part = flat_part(saved[1], saved[2], saved[3], like_bias, saved[5], has_seed ? std::optional(saved[6]) : std::nullopt);
    const double p = has_seed ? context->saved_data["p"].toDouble() : 0;
    const c10::List<bool> needs({need_dA, need_dB, need_dbias});
    const auto found = at::GradMode::is_enabled() || is_many(grads[0]) ? again(grads[0], saved[0], part, p, need_dx, needs)
                                                                       : once(grads[0], saved[0], part, saved[4], p, need_dx, needs);
    if (need_dx) result[0] = found[0];
    if (need_dA) result[2] = found[1];
    if (need_dB) result[3] = found[2];
    if (need_dbias) result[7] = found[3];
    return result;
  }

 private:
  // dx, dA, dB, dbias.
  static std::vector<Tensor> once(const Tensor& dy, const Tensor& x, const FlatParts& part, const Tensor& xa, double p, bool need_dx,
                                  const c10::List<bool>& needs) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_lora::cuda_lora_parts_backward", "")
                               .typed<decltype(lora_parts_backward)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(dy, x, part, xa, c10::List<std::optional<Tensor>>({std::nullopt}), p, need_dx, needs, {}, {}, false);
  }

  // The same by the formula in plain torch (ops/autograd.py), so that it can be differentiated itself.
  static std::vector<Tensor> again(const Tensor& dy, const Tensor& x, const FlatParts& part, double p, bool need_dx,
                                   const c10::List<bool>& needs) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_lora::lora_linear_again", "")
                               .typed<std::vector<Tensor>(const Tensor&, const Tensor&, const FlatParts&, double, bool,
                                                          const c10::List<bool>&)>();
    return op.call(dy, x, part, p, need_dx, needs);
  }
};

}  // namespace

std::optional<Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                                  const std::optional<Tensor>& bias, const Tensor& scale, const std::optional<Tensor>& seed,
                                  double p) {
  if (!takes(x, weight, A, B, bias, scale, seed, p)) return std::nullopt;
  if (p == 0) return LoRALinear::apply(x, weight, A, B, scale, std::nullopt, 0.0, bias);
  const auto drawn = seed ? *seed : at::randint(int64_t{1} << 62, {}, x.options().dtype(at::kLong));
  return LoRALinear::apply(x, weight, A, B, scale, std::optional<Tensor>(drawn), p, bias);
}

}  // namespace fused_lora
