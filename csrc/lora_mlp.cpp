// The gated MLP of LoRA linears: hidden = act(gate) up, which down reads, and its backward pass.
#include "operands.h"

namespace fused_lora {
namespace {

using at::Tensor;

// (M, cols) with padded rows.
Tensor padded_like(const Tensor& x, int64_t M, int64_t cols) {
  return at::empty({M, padded(cols)}, x.options()).narrow(1, 0, cols);
}

// A saved tensor, which a hook may have kept as another one.
Tensor with_stride_of(const Tensor& like, const Tensor& saved) {
  return saved.strides() == like.strides() ? saved : padded_like(saved, like.size(0), like.size(1)).copy_(saved);
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
                                                                      double p, double linear, double cubic, bool keep, bool factors) {
  TORCH_CHECK(weights.size() == 2 && weights[0].size(0) == weights[1].size(0), "gate and up must have the same out_features");
  const c10::cuda::CUDAGuard guard(x.device());
  ForwardOperands operands(x, weights, As, Bs, biases, scales, seed, p);
  const int64_t M = operands.params.x.rows, F = weights[0].size(0);
  const Tensor hidden = padded_like(x, M, F);
  const Tensor gate = padded_like(x, keep ? M : 0, F), up = padded_like(x, keep ? M : 0, F);
  operands.params.gated = true;
  operands.params.factors = keep && factors;
  operands.params.activation = activation_of(linear, cubic);
  operands.params.hidden = matrix_of(hidden);
  if (keep) {
    operands.params.part[0].y = matrix_of(gate);
    operands.params.part[1].y = matrix_of(up);
  }
  operands.launch();
  return {hidden, gate, up, operands.xas[0], operands.xas[1]};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_mlp_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& hidden, const Tensor& gate, const Tensor& up,
    at::TensorList weights, at::TensorList As, at::TensorList Bs, at::TensorList xas, at::TensorList scales,
    const std::optional<Tensor>& seed, const std::optional<Tensor>& down_seed, double p, bool need_dx,
    const c10::List<bool>& need_dA, const c10::List<bool>& need_dB, const c10::List<bool>& need_dbias,
    const std::vector<at::ScalarType>& bias_dtypes, double linear, double cubic) {
  constexpr int kDown = 2;
  TORCH_CHECK(seed.has_value() == down_seed.has_value(), "seed and down_seed must come together");
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t M = gate.size(0), F = gate.size(1);
  const Tensor dgate = padded_like(x, M, F), dup = padded_like(x, M, F), dxa = low_like(x, M, As[kDown].size(0));
  const Dropout dropout = dropout_of(seed, p), down_dropout = dropout_of(down_seed, p);
  const bool makes_hidden = need_dA.get(kDown) && !hidden;
  const Tensor down_x = makes_hidden ? padded_like(x, M, F) : hidden.value_or(gate);  // whose values are not read, without dA

  const Tensor dy_rows = rows_of(dy), x_rows = rows_of(x);
  BackwardOperands first(x);  // dgate and dup from dy
  first.add(dy_rows, dgate, weights[kDown], As[kDown], Bs[kDown], xas[kDown], dxa, scales[kDown], down_dropout, {}, x.scalar_type());
  first.params.needs_dx = true;
  first.params.gated = true;
  first.params.factors = hidden.has_value();
  first.params.activation = activation_of(linear, cubic);
  first.params.gate = first.read(with_stride_of(dgate, gate));
  first.params.up = first.read(with_stride_of(dgate, up));
  first.params.dgate = matrix_of(dgate);
  first.params.dup = matrix_of(dup);
  if (makes_hidden) first.params.hidden = matrix_of(down_x);
  first.launch();

  BackwardOperands second(x);  // the rest: what is summed over tokens belongs together, and down's needs hidden
  const Tensor dys[] = {dgate, dup, dy_rows}, xs[] = {x_rows, x_rows, down_x};
  for (int i = 0; i < 3; ++i) {
    second.add(dys[i], xs[i], weights[i], As[i], Bs[i], xas[i], i == kDown ? dxa : low_like(x, M, As[i].size(0)), scales[i],
               i == kDown ? down_dropout : dropout, {need_dA.get(i), need_dB.get(i), need_dbias.get(i)}, bias_dtypes[i],
               i != kDown);
  }
  const Tensor dx = second.wants_dx(x, need_dx);
  second.launch();
  return {dx, second.dAs, second.dBs, second.dbiases};
}

}  // namespace fused_lora
