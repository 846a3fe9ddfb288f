// Which gradients a backward pass in C++ makes, and where they belong.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "eager_saved.h"

namespace fused_lora {

constexpr size_t kKinds = 4;  // of gradients that a part has: of A, B, bias and gain

// Which gradients autograd asks for.
struct Needs {
  bool dx, any;
  std::vector<bool> of_parts;  // of dAs, dBs, dbiases and dgains

  Needs(torch::autograd::AutogradContext* context, size_t parts) : dx(context->needs_input_grad(0)), any(dx), of_parts(kKinds * parts) {
    const Present present = saved_present(context);
    size_t edge = 1;
    for (size_t i = 0; i < parts; ++i) {
      const bool edges[kKinds] = {true, true, present.bias(i), present.gain(i)};  // autograd counts none for what is absent
      for (size_t kind = 0; kind < kKinds; ++kind) {
        if (edges[kind]) of_parts[kind * parts + i] = context->needs_input_grad(edge++);
      }
    }
    for (const bool need : of_parts) any = any || need;
  }
};

// The parts whose results were used: the others have no share in dx, and their factors get no gradients, as if each had stood
// alone.
struct Used {
  std::vector<size_t> places;

  explicit Used(const torch::autograd::variable_list& dys) {
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
  void fill(torch::autograd::variable_list& result, const std::vector<Tensor>& grads, bool need_dx, const std::vector<bool>& needs,
            size_t first) const {
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
inline std::vector<bool> of_sums(const std::vector<bool>& needs) { return {needs.begin(), needs.end() - needs.size() / kKinds}; }

inline std::vector<std::optional<Tensor>> of_gains(const std::vector<bool>& needs, const torch::autograd::variable_list& ys) {
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

}  // namespace fused_lora
