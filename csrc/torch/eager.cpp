// Parts and gated MLPs as autograd functions in C++: a call from Python takes the host a third of what one by way of autograd.py
// and lora_parts.py does.
#include "eager.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <utility>

#include "eager_needs.h"
#include "eager_passes.h"
#include "eager_rules.h"
#include "eager_saved.h"
#include "operands.h"

namespace fused_lora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool are_right(const Tensor& x, const std::vector<Part>& parts) {
  return std::all_of(parts.begin(), parts.end(), [&](const Part& part) { return is_right(x, part); });
}

// The seed of a pass: none where nothing is dropped, drawn where none is given.
std::optional<Tensor> drawn_seed(const Tensor& x, const std::optional<Tensor>& seed, double p) {
  if (p == 0) return std::nullopt;
  return seed ? seed : at::randint(int64_t{1} << 62, {}, x.options().dtype(at::kLong));
}

// x such that the copy engine can address it: one copy serves both passes.
Tensor readable(const Tensor& x) {
  const Tensor rows = rows_of(x);
  return rows.is_alias_of(x) ? x : rows.view(x.sizes());
}

// What both functions have in common: their arguments that have gradients are x, then A, B, bias and gain of each part, with absent
// ones for the parts up to kMostParts.
constexpr size_t kTensors = kKinds * kMostParts;
using Tensors = std::array<std::optional<Tensor>, kTensors>;

Tensors differentiable(const std::vector<Part>& parts) {
  Tensors tensors;
  for (size_t i = 0; i < parts.size(); ++i) {
    tensors[kKinds * i] = parts[i].A;
    tensors[kKinds * i + 1] = parts[i].B;
    tensors[kKinds * i + 2] = parts[i].bias;
    tensors[kKinds * i + 3] = parts[i].gain;
  }
  return tensors;
}

class LoRAParts : public torch::autograd::Function<LoRAParts> {
 public:
  static constexpr size_t kOwn = 2;  // arguments between x and the tensors of the parts

  template <typename... Rest>
  static variable_list forward(AutogradContext* context, const Tensor& x, const std::vector<Part>& parts, double p, const Rest&...) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const OnDevice here(x);
    const Tensor read = readable(x);
    std::vector<Tensor> results = shown_forward(read, parts, p);
    variable_list saved;
    saved.reserve(1 + (2 + Part::kFields) * parts.size());
    saved.push_back(read);
    saved.insert(saved.end(), results.begin() + parts.size(), results.end());
    for (size_t i = 0; i < parts.size(); ++i) saved.push_back(read_result(parts[i], results[i]));
    save_parts(context, saved, parts, p, false);
    context->set_materialize_grads(false);
    results.resize(parts.size());
    return results;
  }

  static variable_list backward(AutogradContext* context, variable_list dys) {
    const auto saved = context->get_saved_variables();
    const size_t all = dys.size();
    const Needs needs(context, all);
    const Used used(dys);
    variable_list result(1 + kOwn + kTensors);
    if (!needs.any || used.places.empty()) return result;
    std::vector<Part> parts = saved_parts(saved, 1 + 2 * all);
    variable_list xas(saved.begin() + 1, saved.begin() + 1 + all), ys(saved.begin() + 1 + all, saved.begin() + 1 + 2 * all);
    std::vector<bool> of_parts = needs.of_parts;
    if (used.places.size() < all) {
      used.keep(dys);
      used.keep(xas);
      used.keep(ys);
      used.keep(parts);
      of_parts = used.of_parts(needs, all);
    }
    const double p = saved_p(context);
    if (needs_formula(dys)) {
      used.fill(result, backward_by_formula(dys, saved[0], parts, p, {}, needs.dx, of_parts), needs.dx, of_parts, kOwn);
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const size_t count = parts.size();
    const std::vector<Tensor> grads = shown_backward({.dys = std::move(dys),
                                                      .xs = std::vector<Tensor>(count, saved[0]),
                                                      .parts = std::move(parts),
                                                      .xas = std::move(xas),
                                                      .dxas = std::vector<std::optional<Tensor>>(count),
                                                      .p = p,
                                                      .need_dx = needs.dx,
                                                      .needs = of_sums(of_parts),
                                                      .ys = of_gains(of_parts, ys)});
    used.fill(result, grads, needs.dx, of_parts, kOwn);
    return result;
  }
};

// (M, N) in the leading sizes of x, and no view, which could not be changed in place.
Tensor as_rows_of(const Tensor& y, const Tensor& x) {
  auto shape = x.sizes().vec();
  shape.back() = y.size(1);
  return at::_unsafe_view(y, shape);
}

// As LoRAMLPFunction in ops/lora_mlp.py.
class LoRAMLP : public torch::autograd::Function<LoRAMLP> {
 public:
  static constexpr size_t kOwn = 4, kParts = 3;

  template <typename... Rest>
  static Tensor forward(AutogradContext* context, const Tensor& x, const std::vector<Part>& parts, double p,
                        const std::vector<double>& act, bool saves_all, const Rest&...) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const OnDevice here(x);
    const Tensor read = readable(x);
    const bool factors = saves_all && !parts[0].gain && !parts[1].gain;  // what gains made are gate and up themselves
    const auto sides = shown_forward(read, {parts[0], parts[1]}, p, act, factors ? "factors" : "sides");
    const auto down = shown_forward(sides[0], {parts[2]}, p);
    const Tensor y = as_rows_of(down[0], x);
    variable_list saved{read, sides[1], sides[2], factors ? sides[0] : Tensor(), sides[3], sides[4], down[1], read_result(parts[2], y)};
    save_parts(context, saved, parts, p, true);
    context->saved_data["act"] = act;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &first = saved[1], &second = saved[2], &hidden = saved[3];
    const std::vector<Part> parts = saved_parts(saved, 8);
    const Needs needs(context, kParts);
    variable_list result(1 + kOwn + kTensors);
    if (!needs.any) return result;
    const Used all({x, x, x});
    const double p = saved_p(context);
    const auto act = context->saved_data["act"].toDoubleVector();
    if (needs_formula(grads)) {
      all.fill(result, backward_by_formula(grads, x, parts, p, act, needs.dx, needs.of_parts), needs.dx, needs.of_parts, kOwn);
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool factors = hidden.defined();
    const OnDevice here(x);
    const Tensor dy = is_memory(grads[0]) ? rows_of(grads[0]) : flat(grads[0]), rows = flat(x);
    const auto of_down = shown_backward({.dys = {dy},
                                         .xs = {first},
                                         .parts = {parts[2]},
                                         .xas = {saved[6]},
                                         .dxas = {std::nullopt},
                                         .p = p,
                                         .need_dx = true,
                                         .needs = {false, false, false},
                                         .act = act,
                                         .gated = {first, second},
                                         .factors = factors});
    // What is summed over tokens belongs together, down's too.
    auto found = shown_backward({.dys = {of_down[0], of_down[1], dy},
                                 .xs = {rows, rows, factors ? hidden : of_down[2]},
                                 .parts = parts,
                                 .xas = {saved[4], saved[5], saved[6]},
                                 .dxas = {std::nullopt, std::nullopt, of_down[3]},
                                 .p = p,
                                 .need_dx = needs.dx,
                                 .needs = of_sums(needs.of_parts),
                                 .ys = of_gains(needs.of_parts, {first, second, saved[7]})});
    if (needs.dx) found[0] = found[0].view(x.sizes());
    all.fill(result, found, needs.dx, needs.of_parts, kOwn);
    return result;
  }
};

bool trains(const Tensor& x, const std::vector<Part>& parts) {
  if (!at::GradMode::is_enabled()) return false;
  bool any = x.requires_grad();
  for (const Part& part : parts) {
    any = any || part.A.requires_grad() || part.B.requires_grad();
    any = any || (part.bias && part.bias->requires_grad()) || (part.gain && part.gain->requires_grad());
  }
  return any;
}

// F::apply(arguments..., then the tensors one by one).
template <typename F, size_t... kIndex, typename... Args>
auto apply(std::index_sequence<kIndex...>, const Tensors& tensors, const Args&... arguments) {
  return F::apply(arguments..., tensors[kIndex]...);
}

template <typename F, typename... Args>
auto apply_to(const std::vector<Part>& parts, const Tensor& x, const Args&... arguments) {
  return apply<F>(std::make_index_sequence<kTensors>{}, differentiable(parts), x, parts, arguments...);
}

}  // namespace

std::optional<std::vector<Tensor>> lora_group(const Tensor& x, std::vector<Part> parts, const std::optional<Tensor>& seed, double p) {
  if (!takes(x, parts, seed, p, kMaxRank) || !are_right(x, parts)) return std::nullopt;
  const auto drawn = drawn_seed(x, seed, p);
  for (Part& part : parts) part.seed = drawn;
  if (trains(x, parts)) return apply_to<LoRAParts>(parts, x, p);
  const at::AutoDispatchBelowADInplaceOrView below;
  auto results = shown_forward(x, parts, p);
  results.resize(parts.size());
  return results;
}

std::optional<Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                                  const std::optional<Tensor>& bias, const Tensor& scale, const std::optional<Tensor>& seed,
                                  double p, const std::optional<Tensor>& gain) {
  std::vector<Part> parts;
  parts.push_back({weight, A, B, bias, scale, std::nullopt, gain});
  auto ys = lora_group(x, std::move(parts), seed, p);
  return ys ? std::optional((*ys)[0]) : std::nullopt;
}

std::optional<Tensor> lora_mlp(const Tensor& x, std::vector<Part> parts, const std::optional<Tensor>& seed,
                               int64_t down_seed, double p, const std::vector<double>& act, bool saves_all) {
  if (parts.size() != 3 || !takes(x, parts, seed, p, kMaxGatedRank)) return std::nullopt;
  if (!is_right(x, parts[0]) || !is_right(x, parts[1]) || parts[0].weight.size(0) != parts[1].weight.size(0)) return std::nullopt;
  const Tensor of_down = at::empty({0, parts[0].weight.size(0)}, x.options());
  if (!is_right(of_down, parts[2])) return std::nullopt;
  parts[0].seed = parts[1].seed = drawn_seed(x, seed, p);
  if (p > 0) parts[2].seed = parts[0].seed->add(down_seed);
  if (trains(x, parts)) return apply_to<LoRAMLP>(parts, x, p, act, saves_all);
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor hidden = shown_forward(x, {parts[0], parts[1]}, p, act)[0];
  return as_rows_of(shown_forward(hidden, {parts[2]}, p)[0], x);
}

}  // namespace fused_lora
