#include "few_rows.h"

#include <algorithm>

#include "../host/architecture.h"
#include "operands.h"

namespace fused_lora {
namespace {

// Microseconds on an H200, of which ratios matter; measured at 1 to 512 rows, weights of 2 to 134 MB.
constexpr double kLaunch = 8, kProduct = 7, kSmall = 13, kGradients = 5;
constexpr double kStep = 0.36 / 64;                       // of depth, where an SM has one tile and waits for each step
constexpr double kBytes = 1.9e6, kMoreRowsBytes = 2.4e6;  // a microsecond, by these kernels; of 128 rows half the blocks have none
constexpr double kTorchBytes = 3.4e6, kTorchFlops = 6e8;
constexpr int64_t kMostFewRows = 512;

// In place, rounded once: of no dimensions, scale would be rounded to 16 bits first.
Tensor times(Tensor product, const Part& part) { return product.mul_(part.scale.reshape({1})); }

Tensor as(const Tensor& factor, const Tensor& x) { return factor.to(x.scalar_type()); }

// act(t) = t sigmoid(t (linear + cubic t^2))
Tensor activated(const Tensor& gate, const std::vector<double>& act) {
  if (act[0] == 1 && act[1] == 0) return at::silu(gate);
  const Tensor t = gate.to(at::kFloat);
  return t.mul(at::sigmoid(t.mul(t.square().mul(act[1]).add(act[0])))).to(gate.scalar_type());
}

// y = x W^T + bias + xa B^T into rows.
void linear_into(Tensor rows, const Tensor& x, const Part& part, const Tensor& xa) {
  if (part.bias) {
    at::addmm_out(rows, as(*part.bias, x), x, part.weight.t());
  } else {
    at::mm_out(rows, x, part.weight.t());
  }
  if (part.A.size(0) > 0) rows.addmm_(xa, as(part.B, x).t());
}

// A factor's gradient in its dtype, rounded to it once, or an empty one.
Tensor product_if(bool need, const Tensor& lhs, const Tensor& rhs, const Tensor& like) {
  if (!need) return at::empty({0}, like.options());
  return like.scalar_type() == lhs.scalar_type() ? at::mm(lhs, rhs) : at::mm(lhs, rhs, like.scalar_type());
}

Tensor sum_if(bool need, const Tensor& dy, const Tensor& like) {
  return need ? dy.sum(0, false, at::kFloat).to(like.scalar_type()) : at::empty({0}, like.options());
}

// Products in x's dtype, whatever torch.autocast says where a pass runs.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace

bool are_few_rows(int64_t M, const std::vector<Part>& parts, bool backward) {
  if (M > kMostFewRows || current_card().capability != 90) return false;
  double weights = 0, torch = 0;
  int64_t depth = 0;
  for (const Part& part : parts) {
    // A mask, a gain, and float16's room for xa are the kernels'.
    if (part.seed || part.gain || part.stored() || part.weight.scalar_type() == at::kHalf) return false;
    const int64_t N = part.weight.size(0), K = part.weight.size(1);
    if (N % 8 != 0 || K % 8 != 0) return false;  // torch's products are slow there
    const double bytes = 2.0 * N * K;
    weights += bytes;
    depth = backward ? depth + N : K;
    torch += kProduct + kSmall + (backward ? kGradients : 0) + std::max(bytes / kTorchBytes, M * bytes / kTorchFlops);
  }
  const double own = kLaunch + std::max(depth * kStep, weights / (M <= 128 ? kBytes : kMoreRowsBytes));
  return torch < own;
}

bool are_few_rows(int64_t M, int64_t K, int64_t N, bool backward) {
  Part part;
  part.weight = at::empty({N, K}, at::TensorOptions(at::kMeta).dtype(at::kBFloat16));
  return are_few_rows(M, {part}, backward);
}

std::vector<Tensor> few_rows_forward(const Tensor& x, const std::vector<Part>& parts, const std::vector<double>& act) {
  const NoAutocast no_autocast;
  const Tensor rows = flat(x);
  std::vector<Tensor> ys, xas;
  for (const Part& part : parts) {
    auto shape = x.sizes().vec();
    shape.back() = part.weight.size(0);
    xas.push_back(times(at::mm(rows, as(part.A, x).t()), part));
    ys.push_back(at::empty(shape, x.options()));
    linear_into(flat(ys.back()), rows, part, xas.back());
  }
  if (!act.empty()) {
    const Tensor none = padded_like(x, 0, parts[0].weight.size(0)), hidden = padded_like(x, rows.size(0), parts[0].weight.size(0));
    hidden.copy_(activated(flat(ys[0]), act).mul_(flat(ys[1])));
    ys = {hidden, none, none};
  }
  ys.insert(ys.end(), xas.begin(), xas.end());
  return ys;
}

std::vector<Tensor> few_rows_backward(const std::vector<Tensor>& dys, const Tensor& x, const std::vector<Part>& parts, const std::vector<Tensor>& xas,
                                      bool need_dx, const std::vector<bool>& needs) {
  const NoAutocast no_autocast;
  const size_t count = parts.size();
  const Tensor rows = flat(x), dx = at::empty(need_dx ? x.sizes() : at::IntArrayRef{0}, x.options());
  std::vector<Tensor> grads(1 + 3 * count);
  grads[0] = dx;
  for (size_t i = 0; i < count; ++i) {
    const Part& part = parts[i];
    const Tensor dy = flat(dys[i]), dxa = times(at::mm(dy, as(part.B, x)), part);
    if (need_dx) {
      Tensor sum = flat(dx);
      i == 0 ? at::mm_out(sum, dy, part.weight) : sum.addmm_(dy, part.weight);
      sum.addmm_(dxa, as(part.A, x));
    }
    grads[1 + i] = product_if(needs[i], dxa.t(), rows, part.A);
    grads[1 + count + i] = product_if(needs[count + i], dy.t(), xas[i], part.B);
    grads[1 + 2 * count + i] = sum_if(needs[2 * count + i], dy, part.bias.value_or(x));
  }
  return grads;
}

}  // namespace fused_lora
