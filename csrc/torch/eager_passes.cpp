#include "eager_passes.h"

#include <ATen/record_function.h>

#include <algorithm>

#include "eager_rules.h"

#define NAME_OF(op) C10_STRINGIZE(FUSED_LORA_NAMESPACE) "::" op

namespace fused_lora {
namespace {

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
    flat.push_back(part.weight_scale);
    flat.push_back(part.weight_outer);
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
                   pass.act, pass.gated, pass.factors, ys, c10::IValue(), int64_t{0});  // without tables
  op.callBoxed(&stack);
  return stack[0].toTensorVector();
}

std::vector<c10::IValue> shown(const Tensor& x, const std::vector<Part>& parts) {
  std::vector<c10::IValue> inputs{x};
  for (const Part& part : parts) inputs.insert(inputs.end(), {part.weight, part.A, part.B});
  return inputs;
}

}  // namespace

std::vector<Tensor> shown_forward(const Tensor& x, const std::vector<Part>& parts, double p, const std::vector<double>& act,
                                  const std::string& keep) {
  RECORD_FUNCTION(NAME_OF("cuda_lora_parts_forward"), shown(x, parts));
  return lora_parts_forward(x, parts, p, act, keep);
}

std::vector<Tensor> shown_backward(const BackwardPass& pass) {
  if (watched() || !std::all_of(pass.dys.begin(), pass.dys.end(), is_memory)) return by_dispatcher(pass);
  RECORD_FUNCTION(NAME_OF("cuda_lora_parts_backward"), shown(pass.xs[0], pass.parts));
  return lora_parts_backward(pass);
}

std::vector<Tensor> backward_by_formula(at::TensorList dys, const Tensor& x, const std::vector<Part>& parts, double p,
                                        at::ArrayRef<double> act, bool need_dx, const std::vector<bool>& needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(NAME_OF("lora_again"), "")
                             .typed<std::vector<Tensor>(at::TensorList, const Tensor&, const FlatList&, double, at::ArrayRef<double>,
                                                        bool, const c10::List<bool>&)>();
  return op.call(dys, x, flat_list(parts), p, act, need_dx, bool_list(needs));
}

}  // namespace fused_lora
