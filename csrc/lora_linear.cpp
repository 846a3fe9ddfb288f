// The LoRA linear as ops and as an autograd function.
#include "lora_linear.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

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

// torch.func's transformations have to see through what is called.
bool transformed() { return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode); }

// Whether the arguments are right beyond doubt and the kernels take them. Where not, the caller goes the long way, which finds
// the words for what is wrong, or another backend.
bool takes(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias,
           const Tensor& scale, const std::optional<Tensor>& seed, double p) {
  if (!x.is_cuda() || !is_plain(x, x) || !is_16_bit(x) || x.dim() == 0 || x.numel() == 0) return false;
  if (!chosen(x) || transformed()) return false;
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
  return lora_linear_obstacle(r).empty() && weight.stride(1) == 1 && x.numel() / K < kMostRows;
}

class LoRALinear : public torch::autograd::Function<LoRALinear> {
 public:
  // What may be absent comes last: it has no edge then, and needs_input_grad counts edges.
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                        const Tensor& scale, const std::optional<Tensor>& seed, double p, const std::optional<Tensor>& bias) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_lora::cuda_lora_linear_forward", "")
                               .typed<decltype(lora_linear_forward)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor rows = rows_of(x), read = rows.is_alias_of(x) ? x : rows.view(x.sizes());  // a copy serves both passes
    auto [y, xa] = op.call(read, weight, A, B, bias, scale, seed, p);
    context->save_for_backward({read, weight, A, B, xa, scale, seed.value_or(Tensor())});
    if (seed) context->saved_data["p"] = p;
    if (bias) context->saved_data["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_lora::cuda_lora_linear_backward", "")
                               .typed<decltype(lora_linear_backward)>();
    const auto saved = context->get_saved_variables();
    const auto of_bias = context->saved_data.find("bias_dtype");
    const bool need_dx = context->needs_input_grad(0), need_dA = context->needs_input_grad(2),
               need_dB = context->needs_input_grad(3);
    // Edges are those of tensors: x, weight, A, B, scale, then seed and bias where they are.
    const bool has_seed = saved[6].defined(), has_bias = of_bias != context->saved_data.end();
    const bool need_dbias = has_bias && context->needs_input_grad(has_seed ? 6 : 5);
    variable_list result(8);
    if (need_dx || need_dA || need_dB || need_dbias) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const auto seed = has_seed ? std::optional<Tensor>(saved[6]) : std::nullopt;
      const double p = has_seed ? context->saved_data["p"].toDouble() : 0;
      const auto bias_dtype = need_dbias ? std::optional(static_cast<at::ScalarType>(of_bias->second.toInt())) : std::nullopt;
      auto [dx, dA, dB, dbias] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], seed, p, need_dx,
                                         need_dA, need_dB, bias_dtype);
      if (need_dx) result[0] = dx;
      if (need_dA) result[2] = dA;
      if (need_dB) result[3] = dB;
      if (need_dbias) result[7] = dbias;
    }
    return at::GradMode::is_enabled() ? once_differentiable(result) : result;
  }

 private:
  // As torch.autograd.function.once_differentiable: a second derivative raises instead of being silently wrong.
  static variable_list once_differentiable(variable_list& grads) {
    for (Tensor& grad : grads) {
      if (!grad.defined()) continue;
      const auto node = std::make_shared<torch::autograd::DelayedError>(
          "lora_linear is differentiable once: there is no second derivative of it here", 1);
      grad = node->apply({grad.detach().requires_grad_()})[0];
    }
    return grads;
  }
};

}  // namespace

std::string lora_linear_obstacle(int64_t r) {
  if (r > kMaxRank) return "r=" + std::to_string(r) + " is above " + std::to_string(kMaxRank);
  return "";
}

// Those of a group's linear; a rank of 0 stands for no factors.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> lora_group_forward(const Tensor& x, at::TensorList weights, at::TensorList As,
                                                                        at::TensorList Bs,
                                                                        const c10::List<std::optional<Tensor>>& biases,
                                                                        at::TensorList scales, const std::optional<Tensor>& seed,
                                                                        double p) {
  const c10::cuda::CUDAGuard guard(x.device());
  ForwardOperands operands(x, weights, As, Bs, biases, scales, seed, p);
  auto shape = x.sizes().vec();
  std::vector<Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    shape.back() = weights[i].size(0);
    ys.push_back(at::empty(shape, x.options()));
    operands.params.part[i].y = {ys.back().data_ptr(), operands.params.x.rows, shape.back(), shape.back()};
  }
  operands.launch();
  return {ys, operands.xas};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_group_backward(
    at::TensorList dys, const Tensor& x, at::TensorList weights, at::TensorList As, at::TensorList Bs, at::TensorList xas,
    at::TensorList scales, const std::optional<Tensor>& seed, double p, bool need_dx, const c10::List<bool>& need_dA,
    const c10::List<bool>& need_dB, const c10::List<bool>& need_dbias, const std::vector<at::ScalarType>& bias_dtypes) {
  const c10::cuda::CUDAGuard guard(x.device());
  BackwardOperands operands(x);
  const Dropout dropout = dropout_of(seed, p);
  const Tensor rows = rows_of(x);
  for (size_t i = 0; i < weights.size(); ++i) {
    operands.add(dys[i], rows, weights[i], As[i], Bs[i], xas[i], low_like(x, rows.size(0), As[i].size(0)), scales[i], dropout,
                 {need_dA.get(i), need_dB.get(i), need_dbias.get(i)}, bias_dtypes[i]);
  }
  const Tensor dx = operands.wants_dx(x, need_dx);
  operands.launch();
  return {dx, operands.dAs, operands.dBs, operands.dbiases};
}

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                                               const std::optional<Tensor>& bias, const Tensor& scale,
                                               const std::optional<Tensor>& seed, double p) {
  auto [ys, xas] = lora_group_forward(x, weight, A, B, c10::List<std::optional<Tensor>>({bias}), scale, seed, p);
  return {ys[0], xas[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                                const Tensor& A, const Tensor& B, const Tensor& xa,
                                                                const Tensor& scale, const std::optional<Tensor>& seed, double p,
                                                                bool need_dx, bool need_dA, bool need_dB,
                                                                std::optional<at::ScalarType> dbias_dtype) {
  auto [dx, dAs, dBs, dbiases] = lora_group_backward(
      dy, x, weight, A, B, xa, scale, seed, p, need_dx, c10::List<bool>({need_dA}), c10::List<bool>({need_dB}),
      c10::List<bool>({dbias_dtype.has_value()}), {dbias_dtype.value_or(x.scalar_type())});
  return {dx, dAs[0], dBs[0], dbiases[0]};
}

std::optional<Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                                  const std::optional<Tensor>& bias, const Tensor& scale, const std::optional<Tensor>& seed,
                                  double p) {
  if (!takes(x, weight, A, B, bias, scale, seed, p)) return std::nullopt;
  if (p == 0) return LoRALinear::apply(x, weight, A, B, scale, std::nullopt, 0.0, bias);
  const auto drawn = seed ? *seed : at::randint(int64_t{1} << 62, {}, x.options().dtype(at::kLong));
  return LoRALinear::apply(x, weight, A, B, scale, std::optional<Tensor>(drawn), p, bias);
}

}  // namespace fused_lora
