// act(gate) up, whose gate and up are LoRA linears of one x, and the linear that reads it backwards: an MLP's two fused passes.
#include "operands.h"

namespace fused_lora {
namespace {

using at::Tensor;

// (M, cols) with rows padded to 16 bytes.
Tensor padded_like(const Tensor& x, int64_t M, int64_t cols) {
  return at::empty({M, padded(cols)}, x.options()).narrow(1, 0, cols);
}

Activation activation_of(double linear, double cubic) { return {static_cast<float>(linear), static_cast<float>(cubic)}; }

}  // namespace

std::string gated_obstacle(int64_t r) {
  if (r > kMaxGatedRank) return "r=" + std::to_string(r) + " is above " + std::to_string(kMaxGatedRank);
  return "";
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_gated_forward(const Tensor& x, at::TensorList weights, at::TensorList As,
                                                                      at::TensorList Bs,
                                                                      const c10::List<std::optional<Tensor>>& biases,
                                                                      at::TensorList scales, const std::optional<Tensor>& seed,
                                                                      double p, double linear, double cubic, bool keeps_sides) {
  TORCH_CHECK(weights.size() == 2 && weights[0].size(0) == weights[1].size(0), "gate and up must have the same out_features");
  const c10::cuda::CUDAGuard guard(x.device());
  ForwardOperands operands(x, weights, As, Bs, biases, scales, seed, p);
  const int64_t M = operands.params.x.rows, F = weights[0].size(0);
  const Tensor hidden = padded_like(x, M, F);
  const Tensor gate = padded_like(x, keeps_sides ? M : 0, F), up = padded_like(x, keeps_sides ? M : 0, F);
  operands.params.gated = true;
  operands.params.activation = activation_of(linear, cubic);
  operands.params.hidden = matrix_of(hidden);
  if (keeps_sides) {
    operands.params.part[0].y = matrix_of(gate);
    operands.params.part[1].y = matrix_of(up);
  }
  operands.launch();
  return {hidden, gate, up, operands.xas[0], operands.xas[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_gated_backward(const Tensor& dy, const Tensor& hidden, const Tensor& gate,
                                                                       const Tensor& up, const Tensor& weight, const Tensor& A,
                                                                       const Tensor& B, const Tensor& xa, const Tensor& scale,
                                                                       const std::optional<Tensor>& seed, double p, bool need_dA,
                                                                       bool need_dB, std::optional<at::ScalarType> dbias_dtype,
                                                                       double linear, double cubic) {
  const c10::cuda::CUDAGuard guard(dy.device());
  BackwardOperands operands(dy, hidden, weight, A, B, xa, scale, seed, p, c10::List<bool>({need_dA}), c10::List<bool>({need_dB}),
                            c10::List<bool>({dbias_dtype.has_value()}), {dbias_dtype.value_or(dy.scalar_type())});
  const int64_t M = operands.params.x.rows, F = operands.params.x.cols;
  const Tensor dgate = padded_like(hidden, M, F), dup = padded_like(hidden, M, F);
  operands.params.needs_dx = true;
  operands.params.gated = true;
  operands.params.activation = activation_of(linear, cubic);
  operands.params.gate = matrix_of(gate);
  operands.params.up = matrix_of(up);
  operands.params.dgate = matrix_of(dgate);
  operands.params.dup = matrix_of(dup);
  operands.launch();
  return {dgate, dup, operands.dAs[0], operands.dBs[0], operands.dbiases[0]};
}

}  // namespace fused_lora
