// The LoRA linear as ops and as an autograd function.
#include "lora_linear.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "flags.h"
#include "nvtx_range.h"
#include "tensors.h"

namespace fused_lora {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

int64_t padded(int64_t cols) { return (cols + 7) / 8 * 8; }

bool addressable(const Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && matrix.stride(0) >= matrix.size(1) &&
         reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0;
}

// A matrix in `dtype` that the copy engine can address: the matrix itself, or a copy with rows padded to 16 bytes.
Tensor addressed(const Tensor& matrix, at::ScalarType dtype) {
  if (matrix.scalar_type() == dtype && addressable(matrix)) return matrix;
  return at::empty_strided(matrix.sizes(), {padded(matrix.size(1)), 1}, matrix.options().dtype(dtype)).copy_(matrix);
}

// (..., C) as such a matrix.
Tensor rows_of(const Tensor& tensor) {
  return addressed(tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)}), tensor.scalar_type());
}

Tensor low_like(const Tensor& x, int64_t M, int64_t r) { return at::empty_strided({M, r}, {padded(r), 1}, x.options()); }

Matrix matrix_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)}; }

bool is_16_bit(const Tensor& tensor) { return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16; }

bool is_factor_dtype(const Tensor& factor, const Tensor& x) {
  return factor.scalar_type() == x.scalar_type() || factor.scalar_type() == at::kFloat;
}

// No subclass (fake, distributed) either, whose memory is not here.
bool is_plain(const Tensor& tensor, const Tensor& x) {
  return tensor.layout() == at::kStrided && tensor.device() == x.device() && !tensor.key_set().has(c10::DispatchKey::Python);
}

// Whether the arguments are right beyond doubt and the kernels take them. Where not, the caller goes the long way, which finds
// the words for what is wrong, or another backend.
bool takes(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias,
           const Tensor& scale) {
  if (!x.is_cuda() || !is_plain(x, x) || !is_16_bit(x) || x.dim() == 0 || x.numel() == 0) return false;
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
  if (weight.requires_grad() && at::GradMode::is_enabled()) return false;
  return lora_linear_obstacle(K, N, r, 0).empty() && addressable(weight) && x.numel() / K < (int64_t{1} << 31) - 256;
}

class LoRALinear : public torch::autograd::Function<LoRALinear> {
 public:
  // bias comes last: an absent one has no edge, and needs_input_grad counts edges.
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                        const Tensor& scale, const std::optional<Tensor>& bias) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_lora::cuda_lora_linear_forward", "")
                               .typed<decltype(lora_linear_forward)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, xa] = op.call(x, weight, A, B, bias, scale);
    context->save_for_backward({x, weight, A, B, xa, scale});
    if (bias) context->saved_data["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_lora::cuda_lora_linear_backward", "")
                               .typed<decltype(lora_linear_backward)>();
    const auto saved = context->get_saved_variables();
    const Tensor& dy = grads[0];
    const bool need_dx = context->needs_input_grad(0), need_dA = context->needs_input_grad(2),
               need_dB = context->needs_input_grad(3);
    variable_list result(6);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      if (need_dx || need_dA || need_dB) {
        auto [dx, dA, dB] = op.call(dy, saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], need_dx, need_dA, need_dB);
        if (need_dx) result[0] = dx;
        if (need_dA) result[2] = dA;
        if (need_dB) result[3] = dB;
      }
      const auto bias_dtype = context->saved_data.find("bias_dtype");
      if (bias_dtype != context->saved_data.end() && context->needs_input_grad(5)) {
        const auto dtype = static_cast<at::ScalarType>(bias_dtype->second.toInt());
        result[5] = at::sum(dy.reshape({-1, dy.size(-1)}), {0}, false, at::kFloat).to(dtype);
      }
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

std::string lora_linear_obstacle(int64_t in_features, int64_t out_features, int64_t r, double p) {
  if (in_features % 8 != 0) return "in_features=" + std::to_string(in_features) + " is not a multiple of 8";
  if (out_features % 8 != 0) return "out_features=" + std::to_string(out_features) + " is not a multiple of 8";
  if (r > kMaxRank) return "r=" + std::to_string(r) + " is above " + std::to_string(kMaxRank);
  if (p != 0) return "dropout";
  return "";
}

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                                               const std::optional<Tensor>& bias, const Tensor& scale) {
  TORCH_CHECK(!bias || bias->is_contiguous(), "bias must be contiguous, got strides ", bias->strides());
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor rows = rows_of(x), factor_A = addressed(A, x.scalar_type()), factor_B = addressed(B, x.scalar_type());
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  const Tensor y = at::empty(shape, x.options()), xa = low_like(x, rows.size(0), A.size(0));
  const ForwardParams params{
      .x = matrix_of(rows),
      .weight = matrix_of(weight),
      .A = matrix_of(factor_A),
      .B = matrix_of(factor_B),
      .xa = matrix_of(xa),
      .y = {y.data_ptr(), rows.size(0), weight.size(0), weight.size(0)},
      .scale = scale.data_ptr<float>(),
      .bias = bias ? bias->data_ptr() : nullptr,
      .bias_dtype = bias ? dtype_of("bias", *bias) : DType::kFloat32,
      .dtype = dtype_of("x", x),
      .flags = launch_flags(forward_flags(rows.size(0))),
  };
  const NvtxRange range("forward");
  C10_CUDA_CHECK(launch_lora_linear_forward(params, c10::cuda::getCurrentCUDAStream()));
  return {y, xa};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A,
                                                        const Tensor& B, const Tensor& xa, const Tensor& scale, bool need_dx,
                                                        bool need_dA, bool need_dB) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor rows = rows_of(x), dy_rows = rows_of(dy), low = rows_of(xa);
  const Tensor factor_A = addressed(A, x.scalar_type()), factor_B = addressed(B, x.scalar_type());
  const int64_t M = rows.size(0), K = weight.size(1), N = weight.size(0), r = A.size(0);
  const Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const Tensor dA = at::empty(need_dA ? A.sizes() : at::IntArrayRef{0}, A.options());
  const Tensor dB = at::empty(need_dB ? B.sizes() : at::IntArrayRef{0}, B.options());
  const Tensor dxa = low_like(x, M, r);
  const Tensor partial = at::empty({backward_partials(K, N, r)}, x.options().dtype(at::kFloat));
  const BackwardParams params{
      .dy = matrix_of(dy_rows),
      .x = matrix_of(rows),
      .weight = matrix_of(weight),
      .A = matrix_of(factor_A),
      .B = matrix_of(factor_B),
      .xa = matrix_of(low),
      .dxa = matrix_of(dxa),
      .dx = {dx.data_ptr(), M, K, K},
      .dA = dA.data_ptr(),
      .dB = dB.data_ptr(),
      .needs_dx = need_dx,
      .needs_dA = need_dA,
      .needs_dB = need_dB,
      .factor_dtype = dtype_of("A", A),
      .dtype = dtype_of("x", x),
      .scale = scale.data_ptr<float>(),
      .flags = launch_flags(backward_flags(M, K, N)),
      .partial = partial.data_ptr<float>(),
  };
  const NvtxRange range("backward");  // here: ranges are a thread's, and autograd's is another
  C10_CUDA_CHECK(launch_lora_linear_backward(params, c10::cuda::getCurrentCUDAStream()));
  return {dx, dA, dB};
}

std::optional<Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                                  const std::optional<Tensor>& bias, const Tensor& scale) {
  if (!takes(x, weight, A, B, bias, scale)) return std::nullopt;
  return LoRALinear::apply(x, weight, A, B, scale, bias);
}

}  // namespace fused_lora
