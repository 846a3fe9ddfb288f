// Parts and gated MLPs as autograd functions in C++: a call from Python takes the host a third of what one by way of autograd.py
// and lora_parts.py does.
#include "eager.h"

#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "operands.h"

#define NAME_OF(op) C10_STRINGIZE(FUSED_LORA_NAMESPACE) "::" op

namespace fused_lora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool is_16_bit(const Tensor& tensor) { return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16; }

bool is_factor_dtype(const Tensor& factor, const Tensor& x) {
  return factor.scalar_type() == x.scalar_type() || factor.scalar_type() == at::kFloat;
}

// Whether its memory holds its values: not of a subclass (fake, distributed), whose memory is elsewhere.
bool is_memory(const Tensor& tensor) {
  return !tensor.key_set().has(c10::DispatchKey::Python) && !tensor.is_neg() && !tensor._is_zerotensor();
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

// As in ops/autograd.py: who must see plain torch. An exporter traces, too. A mode (that counts, or saves by name) sees the ops
// of every backend.
bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || torch::jit::tracer::isTracing();
}

// Whether a part is right beyond doubt.
bool is_right(const Tensor& x, const Part& part) {
  const auto& [weight, A, B, bias, scale, seed, gain] = part;
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

// Whether a gradient is many at once, of torch.func.vmap or of is_grads_batched.
bool is_many(const Tensor& dy) {
  return dy.defined() && (dy.key_set().has(c10::DispatchKey::FuncTorchBatched) || dy.key_set().has(c10::DispatchKey::Batched));
}

// Whether a backward pass is to be differentiated itself, or is many at once: by the formula.
bool needs_formula(const variable_list& dys) { return at::GradMode::is_enabled() || std::any_of(dys.begin(), dys.end(), is_many); }

// Whether the arguments are right beyond doubt and the kernels take them. Where not, the caller goes the long way, which finds
// the words for what is wrong, or another backend.
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

bool are_right(const Tensor& x, const std::vector<Part>& parts) {
  return std::all_of(parts.begin(), parts.end(), [&](const Part& part) { return is_right(x, part); });
}

// The seed of a pass: none where nothing is dropped, drawn where none is given.
std::optional<Tensor> drawn_seed(const Tensor& x, const std::optional<Tensor>& seed, double p) {
  if (p == 0) return std::nullopt;
  return seed ? seed : at::randint(int64_t{1} << 62, {}, x.options().dtype(at::kLong));
}

using FlatList = c10::List<std::optional<Tensor>>;

FlatList flat_list(const std::vector<Part>& parts) {
  FlatList flat;
  flat.reserve(Part::kFields * parts.size());
  for (const Part& part : parts) {
    for (const Tensor* tensor : {&part.weight, &part.A, &part.B}) flat.push_back(*tensor);
    flat.push_back(part.bias);
    flat.push_back(part.scale);
    flat.push_back(part.seed);
    flat.push_back(part.gain);
  }
  return flat;
}

c10::List<bool> bool_list(const std::vector<bool>& bools) {
  c10::List<bool> list;
  for (const bool each : bools) list.push_back(each);
  return list;
}

// A backward pass as an op: for modes and tensors that watch ops, and for what torch has to make memory of.
std::vector<Tensor> by_dispatcher(const BackwardPass& pass) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(NAME_OF("cuda_lora_parts_backward"), "");
  FlatList dxas, ys;
  for (const std::optional<Tensor>& dxa : pass.dxas) dxas.push_back(dxa);
  for (const std::optional<Tensor>& y : pass.ys) ys.push_back(y);
  torch::jit::Stack stack;
  torch::jit::push(stack, pass.dys, pass.xs, flat_list(pass.parts), pass.xas, dxas, pass.p, pass.need_dx, bool_list(pass.needs),
                   pass.act, pass.gated, pass.factors, ys);
  op.callBoxed(&stack);
  return stack[0].toTensorVector();
}

std::vector<c10::IValue> shown(const Tensor& x, const std::vector<Part>& parts) {
  std::vector<c10::IValue> inputs{x};
  for (const Part& part : parts) inputs.insert(inputs.end(), {part.weight, part.A, part.B});
  return inputs;
}

// The passes by themselves, under the names of their ops, and with x and matrices for inputs, in a profile.
std::vector<Tensor> forward(const Tensor& x, const std::vector<Part>& parts, double p, const std::vector<double>& act = {},
                            const std::string& keep = "none") {
  RECORD_FUNCTION(NAME_OF("cuda_lora_parts_forward"), shown(x, parts));
  return lora_parts_forward(x, parts, p, act, keep);
}

std::vector<Tensor> backward(const BackwardPass& pass) {
  if (watched() || !std::all_of(pass.dys.begin(), pass.dys.end(), is_memory)) return by_dispatcher(pass);
  RECORD_FUNCTION(NAME_OF("cuda_lora_parts_backward"), shown(pass.xs[0], pass.parts));
  return lora_parts_backward(pass);
}

// A backward pass by the formula in plain torch (ops/autograd.py), so that it can be differentiated itself: dx, dAs, dBs, dbiases
// and dgains.
std::vector<Tensor> again(at::TensorList dys, const Tensor& x, const std::vector<Part>& parts, double p, at::ArrayRef<double> act,
                          bool need_dx, const std::vector<bool>& needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(NAME_OF("lora_again"), "")
                             .typed<std::vector<Tensor>(at::TensorList, const Tensor&, const FlatList&, double, at::ArrayRef<double>,
                                                        bool, const c10::List<bool>&)>();
  return op.call(dys, x, flat_list(parts), p, act, need_dx, bool_list(needs));
}

// x such that the copy engine can address it: one copy serves both passes.
Tensor readable(const Tensor& x) {
  const Tensor rows = rows_of(x);
  return rows.is_alias_of(x) ? x : rows.view(x.sizes());
}

// What both functions have in common: their arguments that have gradients are x, then A, B, bias and gain of each part, with absent
// ones for the parts up to kMostParts. Autograd counts edges, and an absent bias or gain has none.
constexpr size_t kKinds = 4, kTensors = kKinds * kMostParts;
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

// What a backward pass reads of a linear's bias: the dtype of its gradient, and all of it where there is a gain.
Tensor read_bias(const Part& part) {
  if (part.gain) return part.bias.value_or(Tensor());
  return part.bias && part.bias->requires_grad() ? at::empty({0}, part.bias->options()) : Tensor();
}

// The result, where a gain's gradient is made of it.
Tensor read_result(const Part& part, const Tensor& y) { return part.gain && part.gain->requires_grad() ? y : Tensor(); }

// The same tensors in the same order as ops/autograd.py and ops/lora_mlp.py save: a checkpoint, which counts them, may go by the one
// way first and by the other then.
void save_parts(AutogradContext* context, variable_list& saved, const std::vector<Part>& parts, double p, bool biases) {
  int64_t present = 0;  // two bits a part
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    const Tensor bias = biases ? part.bias.value_or(Tensor()) : read_bias(part);
    for (const Tensor* tensor : {&part.weight, &part.A, &part.B, &bias, &part.scale}) saved.push_back(*tensor);
    saved.push_back(part.seed.value_or(Tensor()));
    saved.push_back(part.gain.value_or(Tensor()));
    present |= (int64_t{part.bias.has_value()} | int64_t{part.gain.has_value()} << 1) << 2 * i;
  }
  context->save_for_backward(saved);
  if (p != 0) context->saved_data["p"] = p;  // an entry takes the host 0.2 us
  if (present != 0) context->saved_data["present"] = present;
}

double saved_p(AutogradContext* context) {
  const auto found = context->saved_data.find("p");
  return found == context->saved_data.end() ? 0.0 : found->second.toDouble();
}

std::optional<Tensor> if_defined(const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

std::vector<Part> saved_parts(const variable_list& saved, size_t first) {
  std::vector<Part> parts;
  for (size_t i = first; i < saved.size(); i += Part::kFields) {
    parts.push_back({saved[i], saved[i + 1], saved[i + 2], if_defined(saved[i + 3]), saved[i + 4], if_defined(saved[i + 5]),
                     if_defined(saved[i + 6])});
  }
  return parts;
}

// Which gradients autograd asks for.
struct Needs {
  bool dx, any;
  std::vector<bool> of_parts;  // of dAs, dBs, dbiases and dgains

  Needs(AutogradContext* context, size_t parts) : dx(context->needs_input_grad(0)), any(dx), of_parts(kKinds * parts) {
    const auto found = context->saved_data.find("present");
    const int64_t present = found == context->saved_data.end() ? 0 : found->second.toInt();
    size_t edge = 1;
    for (size_t i = 0; i < parts; ++i) {
      for (size_t kind = 0; kind < kKinds; ++kind) {
        const bool has_edge = kind < 2 || (present >> (2 * i + kind - 2) & 1);
        if (has_edge) of_parts[kind * parts + i] = context->needs_input_grad(edge++);
      }
    }
    for (const bool need : of_parts) any = any || need;
  }
};

// The parts whose results were used: the others have no share in dx, and their factors get no gradients, as if each had stood
// alone.
struct Used {
  std::vector<size_t> places;

  explicit Used(const variable_list& dys) {
    places.reserve(dys.size());
    for (size_t i = 0; i < dys.size(); ++i) {
      if (dys[i].defined()) places.push_back(i);
    }
  }

  // Leaves theirs of what all parts have.
  template <typename T>
  void keep(std::vector<T>& all) const {
    for (size_t i = 0; i < places.size(); ++i) all[i] = all[places[i]];
    all.resize(places.size());
  }

  std::vector<bool> of_parts(const Needs& needs, size_t parts) const {
    std::vector<bool> found;
    for (size_t kind = 0; kind < kKinds; ++kind) {
      for (const size_t place : places) found.push_back(needs.of_parts[kind * parts + place]);
    }
    return found;
  }

  // dx, dAs, dBs, dbiases, dgains as gradients of a function's arguments, of which `first` come between x and the tensors of its parts.
  void fill(variable_list& result, const std::vector<Tensor>& grads, bool need_dx, const std::vector<bool>& needs, size_t first) const {
    const size_t count = places.size();
    if (need_dx) result[0] = grads[0];
    for (size_t i = 0; i < count; ++i) {
      for (size_t kind = 0; kind < kKinds; ++kind) {
        if (needs[kind * count + i]) result[1 + first + kKinds * places[i] + kind] = grads[1 + kind * count + i];
      }
    }
  }
};

// Of all needs those that a pass knows by name, and the results that it reads for gains: none where no gain has a gradient.
std::vector<bool> of_sums(const std::vector<bool>& needs) { return {needs.begin(), needs.end() - needs.size() / kKinds}; }

std::vector<std::optional<Tensor>> of_gains(const std::vector<bool>& needs, const variable_list& ys) {
  const size_t count = ys.size(), first = (kKinds - 1) * count;
  std::vector<std::optional<Tensor>> found(count);
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    if (!needs[first + i]) continue;
    found[i] = ys[i];
    any = true;
  }
  if (!any) found.clear();
  return found;
}

class LoRAParts : public torch::autograd::Function<LoRAParts> {
 public:
  static constexpr size_t kOwn = 2;  // arguments between x and the tensors of the parts

  template <typename... Rest>
  static variable_list forward(AutogradContext* context, const Tensor& x, const std::vector<Part>& parts, double p, const Rest&...) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const OnDevice here(x);
    const Tensor read = readable(x);
    std::vector<Tensor> results = fused_lora::forward(read, parts, p);
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
      used.fill(result, again(dys, saved[0], parts, p, {}, needs.dx, of_parts), needs.dx, of_parts, kOwn);
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const size_t count = parts.size();
    const std::vector<Tensor> grads = fused_lora::backward({.dys = std::move(dys),
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
    const auto sides = fused_lora::forward(read, {parts[0], parts[1]}, p, act, factors ? "factors" : "sides");
    const auto down = fused_lora::forward(sides[0], {parts[2]}, p);
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
      all.fill(result, again(grads, x, parts, p, act, needs.dx, needs.of_parts), needs.dx, needs.of_parts, kOwn);
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool factors = hidden.defined();
    const OnDevice here(x);
    const Tensor dy = is_memory(grads[0]) ? rows_of(grads[0]) : flat(grads[0]), rows = flat(x);
    const auto of_down = fused_lora::backward({.dys = {dy},
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
    auto found = fused_lora::backward({.dys = {of_down[0], of_down[1], dy},
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
  auto results = forward(x, parts, p);
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
  const Tensor hidden = forward(x, {parts[0], parts[1]}, p, act)[0];
  return as_rows_of(forward(hidden, {parts[2]}, p)[0], x);
}

}  // namespace fused_lora
