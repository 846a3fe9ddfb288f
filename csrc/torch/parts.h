// Parts of a pass as tensors, and the pair of passes over them.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace fused_lora {

// Tensors of parts one part after another, in the order of ops/parts.py: weight, A, B, bias, scale, seed, gain, and of a weight in a
// format its scale and outer.
using FlatParts = std::vector<std::optional<Tensor>>;

struct Part {
  static constexpr int kFields = 9;
  Tensor weight, A, B;
  std::optional<Tensor> bias;
  Tensor scale;
  std::optional<Tensor> seed, gain, weight_scale, weight_outer;

  bool stored() const { return weight_scale.has_value(); }
  // W's sizes. NF4's codes, two a byte, tell no more than how many there are, and may have one too many.
  int64_t K() const { return stored() ? A.size(1) : weight.size(1); }
  int64_t N() const { return stored() && weight.scalar_type() == ScalarType::Byte ? 2 * weight.numel() / K() : weight.size(0); }
};

inline std::vector<Part> unflatten(const FlatParts& flat) {
  check(flat.size() % Part::kFields == 0, "parts must be flat, of ", Part::kFields, " tensors each, got ", flat.size());
  std::vector<Part> parts;
  parts.reserve(flat.size() / Part::kFields);
  for (size_t i = 0; i < flat.size(); i += Part::kFields) {
    parts.push_back({flat[i].value(), flat[i + 1].value(), flat[i + 2].value(), flat[i + 3], flat[i + 4].value(), flat[i + 5],
                     flat[i + 6], flat[i + 7], flat[i + 8]});
  }
  return parts;
}

inline bool have_gains(const std::vector<Part>& parts) {
  return std::any_of(parts.begin(), parts.end(), [](const Part& part) { return part.gain.has_value(); });
}

// Which adapter each row has (work/segments.h): of each part its blocks, windows and rows, and with dropout thresholds of rows, as int32;
// and a window's ranks. None: all rows have the part's factors.
struct Routing {
  std::vector<Tensor> tables;
  int64_t window = 0;
  size_t of_part = 3;

  explicit operator bool() const { return window > 0; }
  bool drops() const { return of_part == 4; }
  const Tensor& blocks(size_t part) const { return tables[of_part * part]; }
  const Tensor& windows(size_t part) const { return tables[of_part * part + 1]; }
  const Tensor& rows(size_t part) const { return tables[of_part * part + 2]; }
  const Tensor& thresholds(size_t part) const { return tables[of_part * part + 3]; }
};

// The pair (lora_parts.cpp), as ops/lora_parts.py describes it. act is empty, or of a gated pass its two numbers; keep is "none",
// "sides" or "factors".
std::vector<Tensor> lora_parts_forward(const Tensor& x, const std::vector<Part>& parts, double p, const std::vector<double>& act,
                                       const std::string& keep, const Routing& routing = {});

// ys is empty, or has the result of each part whose gain has a gradient: those then follow dbiases. csrc/sm90 alone knows gains
// backward.
struct BackwardPass {
  std::vector<Tensor> dys, xs;
  std::vector<Part> parts;
  std::vector<Tensor> xas;
  std::vector<std::optional<Tensor>> dxas;
  double p;
  bool need_dx;
  std::vector<bool> needs;
  std::vector<double> act;
  std::vector<Tensor> gated;
  bool factors;
  std::vector<std::optional<Tensor>> ys;
  Routing routing;
};
std::vector<Tensor> lora_parts_backward(const BackwardPass& pass);

}  // namespace fused_lora
