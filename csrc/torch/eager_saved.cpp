#include "eager_saved.h"

#include <torch/csrc/autograd/engine.h>

namespace fused_lora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a backward pass reads of a linear's bias: the dtype of its gradient, and all of it where there is a gain.
Tensor read_bias(const Part& part) {
  if (part.gain) return part.bias.value_or(Tensor());
  return part.bias && part.bias->requires_grad() ? at::empty({0}, part.bias->options()) : Tensor();
}

// As ops/lasting.py: what no hook for saved tensors need see, trained factors and scales.
class Lasting {
 public:
  static Lasting to_save() {
    return Lasting(torch::autograd::Engine::get_default_engine().get_default_saved_variable_hooks() != nullptr);
  }

  static Lasting saved_in(AutogradContext* context) {
    Lasting lasting(false);
    const auto found = context->saved_data.find("lasting");
    if (found == context->saved_data.end()) return lasting;
    lasting.tensors_ = found->second.toTensorVector();
    check(lasting.versions() == context->saved_data["versions"].toInt(),
          "one of the variables needed for gradient computation has been modified by an inplace operation: A, B or scale of a LoRA "
          "linear");
    return lasting;
  }

  // The tensor as it is to be saved.
  Tensor kept(const Tensor& tensor) {
    if (!has_hooks_ || !lasts(tensor)) return tensor;
    tensors_.push_back(tensor);
    return Tensor();
  }

  void keep_in(AutogradContext* context) const {
    if (tensors_.empty()) return;
    context->saved_data["lasting"] = tensors_;
    context->saved_data["versions"] = versions();
  }

  // Given back, in the order of kept.
  Tensor found(const Tensor& saved) { return saved.defined() ? saved : tensors_.at(next_++); }

 private:
  static bool lasts(const Tensor& tensor) {
    return tensor.is_leaf() && !tensor.is_inference() && (tensor.requires_grad() || tensor.dim() == 0);
  }

  // They only grow.
  int64_t versions() const {
    int64_t sum = 0;
    for (const Tensor& tensor : tensors_) sum += static_cast<int64_t>(tensor._version());
    return sum;
  }

  explicit Lasting(bool has_hooks) : has_hooks_(has_hooks) {}

  bool has_hooks_;
  std::vector<Tensor> tensors_;
  size_t next_ = 0;
};

std::optional<Tensor> if_defined(const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

}  // namespace

Tensor read_result(const Part& part, const Tensor& y) { return part.gain && part.gain->requires_grad() ? y : Tensor(); }

void save_parts(AutogradContext* context, variable_list& saved, const std::vector<Part>& parts, double p, bool biases) {
  int64_t present = 0;  // as Present has it
  Lasting lasting = Lasting::to_save();
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    saved.insert(saved.end(), {part.weight, lasting.kept(part.A), lasting.kept(part.B)});
    saved.push_back(biases ? part.bias.value_or(Tensor()) : read_bias(part));
    saved.push_back(lasting.kept(part.scale));
    saved.push_back(part.seed.value_or(Tensor()));
    saved.push_back(part.gain.value_or(Tensor()));
    present |= (int64_t{part.bias.has_value()} | int64_t{part.gain.has_value()} << 1) << 2 * i;
  }
  context->save_for_backward(saved);
  lasting.keep_in(context);
  if (p != 0) context->saved_data["p"] = p;  // an entry takes the host 0.2 us
  if (present != 0) context->saved_data["present"] = present;
}

std::vector<Part> saved_parts(AutogradContext* context, const variable_list& saved, size_t first) {
  Lasting lasting = Lasting::saved_in(context);
  std::vector<Part> parts;
  for (size_t i = first; i < saved.size(); i += Part::kFields) {
    const Tensor A = lasting.found(saved[i + 1]), B = lasting.found(saved[i + 2]), scale = lasting.found(saved[i + 4]);
    parts.push_back({saved[i], A, B, if_defined(saved[i + 3]), scale, if_defined(saved[i + 5]), if_defined(saved[i + 6])});
  }
  return parts;
}

double saved_p(AutogradContext* context) {
  const auto found = context->saved_data.find("p");
  return found == context->saved_data.end() ? 0.0 : found->second.toDouble();
}

Present saved_present(AutogradContext* context) {
  const auto found = context->saved_data.find("present");
  return {found == context->saved_data.end() ? 0 : found->second.toInt()};
}

}  // namespace fused_lora
