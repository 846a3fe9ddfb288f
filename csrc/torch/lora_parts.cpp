// The pair of ops behind linears, groups and gated MLPs: from parts to the parameters of a launch, and its workspaces.
#include "../host/architecture.h"
#include "../host/launch.h"
#include "../scaled_rows.h"
#include "few_rows.h"
#include "operands.h"
#include "stored.h"

namespace fused_lora {
namespace {

void check_count(size_t parts) {
  check(parts >= 1 && parts <= kMostParts, "a pass has 1 to ", kMostParts, " parts, got ", parts);
}

// Where the gradient of a factor or a bias goes.
Tensor grad_of(const Tensor& like, Sizes sizes, bool need) {
  const int64_t none[] = {0};
  return empty(need ? sizes : Sizes(none), like);
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// A saved tensor, which a hook may have kept as another one.
Tensor with_stride_of(const Tensor& like, const Tensor& saved) {
  if (saved.stride(0) == like.stride(0) && saved.stride(1) == like.stride(1)) return saved;
  Tensor copy = padded_like(saved, like.size(0), like.size(1));
  copy_into(copy, saved);
  return copy;
}

const float* scale_of(const Part& part) {
  check(part.scale.scalar_type() == ScalarType::Float, "scale must be a float32 on the device");
  return static_cast<const float*>(part.scale.data_ptr());
}

const float* gain_of(const Part& part) {
  if (!part.gain) return nullptr;
  check(part.gain->scalar_type() == ScalarType::Float && part.gain->is_contiguous(), "gain must be contiguous float32");
  return static_cast<const float*>(part.gain->data_ptr());
}

ForwardPart read_part(const Part& part, const Tensor& xa, double p, Readable& read) {
  check(!part.bias || part.bias->is_contiguous(), "bias must be contiguous");
  return {
      .weight = part.stored() ? sizes_of_stored(part, xa) : read(part.weight),
      .A = read(part.A),
      .B = read(part.B),
      .bias = part.bias ? dense_operand(*part.bias, part.bias->numel()) : Operand{},
      .xa = operand_of(xa),
      .y = {},
      .gain = gain_of(part),
      .scale = scale_of(part),
      .dropout = dropout_of(part.seed, p),
      .stored = stored_of(part),
  };
}

// With rows that are contiguous.
Tensor in_rows(const Tensor& matrix) {
  if (matrix.size(1) <= 1 || matrix.stride(1) == 1) return matrix;
  Tensor copy = empty(matrix.sizes(), matrix);
  copy_into(copy, matrix);
  return copy;
}

// gain W, where it is needed, and gain B for W and B.
void scale_rows(Tensor& weight, Tensor& B, const Part& part, bool need_weight, const Tensor& x) {
  const Tensor to_weight = padded_like(x, need_weight ? weight.size(0) : 0, weight.size(1)), to_B = padded_like(x, B.size(0), B.size(1));
  const Tensor from = addressed(weight, x.scalar_type()), from_B = in_rows(B);
  const Operand out = need_weight ? operand_of(to_weight) : Operand{};
  check_cuda(launch_scaled_rows(gain_of(part), operand_of(from), operand_of(from_B), out, operand_of(to_B), stream_of(x)));
  if (need_weight) weight = to_weight;
  B = to_B;
}

// What dgain is made of, and where it goes: nothing without y.
Tensor read_gain(BackwardPart& params, const Part& part, const std::optional<Tensor>& y, Readable& read) {
  const int64_t N = part.N(), sizes[] = {y ? N : 0};
  const Tensor dgain = empty(sizes, part.weight, ScalarType::Float);
  if (!y) return dgain;
  check(part.gain.has_value(), "ys must have entries of parts with a gain alone");
  check(!part.bias || part.bias->is_contiguous(), "bias must be contiguous");
  params.y = read(flat(*y));
  if (part.bias) params.bias = dense_operand(*part.bias, N);
  params.dgain = static_cast<float*>(dgain.data_ptr());
  return dgain;
}

// Boxes of 64 ranks of low, at most: of each block those of its windows, of which two blocks share one at most on a level.
int64_t low_boxes(const Routing& routing, size_t part) {
  const Tensor& blocks = routing.blocks(part);
  return routing.window / 64 * (blocks.size(0) * (blocks.size(1) - 1) + routing.windows(part).size(0));
}

Tensor empty_low(const Tensor& x, int64_t M, int64_t r, const Routing& routing, size_t part) {
  if (!routing) return padded_like(x, M, r);
  return padded_like(x, low_boxes(routing, part) * kSegmentRows, 64);
}

work::Segments segments_of(const Routing& routing, size_t part, const Tensor& A) {
  if (!routing) return {};
  const Tensor &blocks = routing.blocks(part), &windows = routing.windows(part), &rows = routing.rows(part);
  return {.blocks = static_cast<const work::Block*>(blocks.data_ptr()),
          .windows = static_cast<const work::Window*>(windows.data_ptr()),
          .rows = static_cast<const work::Row*>(rows.data_ptr()),
          .windows_count = static_cast<int>(windows.size(0)),
          .levels = static_cast<int>(blocks.size(0)),
          .blocks_count = static_cast<int>(blocks.size(1)),
          .ranks = static_cast<int>(A.size(0)),
          .thresholds = routing.drops() ? static_cast<const uint32_t*>(routing.thresholds(part).data_ptr()) : nullptr};
}

void check_table(const Tensor& table, std::initializer_list<int64_t> sizes) {
  check(table.scalar_type() == ScalarType::Int && table.is_contiguous() && table.is_cuda(), "tables must be contiguous int32 on the device");
  check(std::equal(sizes.begin(), sizes.end(), table.sizes().begin(), table.sizes().end()), "tables must be of x's rows");
}

void check_routing(const Routing& routing, const std::vector<Part>& parts, double p, bool gated, const Tensor& x) {
  if (!routing) return;
  check(p == 0, "rows with adapters of their own drop by thresholds, not by p");
  const bool plain = !gated && !routing.drops(), one_of_both = gated != routing.drops();
  check(plain || (one_of_both && current_card().capability == 90),
        "no kernel of this card has such gated passes, or dropout, of rows with adapters of their own");
  check(!gated || routing.window <= kMaxGatedRank, "window must be at most ", kMaxGatedRank, " in gated passes, got ", routing.window);
  check(routing.window == 64 || routing.window == 128 || routing.window == 256, "window must be 64, 128 or 256, got ", routing.window);
  check(routing.tables.size() == (routing.drops() ? 4 : 3) * parts.size(), "tables must be three or four of each part");
  const int64_t blocks = (x.numel() / x.size(-1) + kSegmentRows - 1) / kSegmentRows;
  for (size_t i = 0; i < parts.size(); ++i) {
    check(parts[i].scale.numel() * work::kSlice >= parts[i].A.size(0), "scale must have an entry for each 16 ranks");
    check(parts[i].A.size(0) % 64 == 0, "slabs must have a multiple of 64 ranks, got ", parts[i].A.size(0));
    check(!parts[i].gain, "rows with adapters of their own have no gain");
    const int64_t levels = routing.blocks(i).size(0), windows = routing.windows(i).size(0);
    check(windows > 0, "rows with adapters of their own must have one");
    check(levels == 1 || x.scalar_type() != ScalarType::Half, "rows whose adapters add up have no room of one size in float16");
    check_table(routing.blocks(i), {levels, blocks, 4});
    check_table(routing.windows(i), {windows, 4});
    check_table(routing.rows(i), {levels, blocks * kSegmentRows, 2});
    check(parts[i].A.scalar_type() == parts[0].A.scalar_type(), "parts must have factors of one dtype");
    check(parts[i].seed.has_value() == routing.drops(), "parts must have a seed where there are thresholds, and none elsewhere");
    if (routing.drops()) check_table(routing.thresholds(i), {levels, blocks * kSegmentRows});
  }
}

// Of what architecture has a way of its own.
bool takes_few_rows(int64_t M, const std::vector<Part>& parts, bool gated, const Routing& routing) {
  if (gated || current_card().capability != 90) return false;
  return std::all_of(parts.begin(), parts.end(), [&](const Part& part) {
    return !part.seed && !part.stored() && sm90::takes_few_rows(M, part.N(), part.K(), part.A.size(0), bool{routing});
  });
}

// A launch, and torch's memory for its sums and its ring, which is free for what comes behind it on its stream.
template <typename Params>
void launch(const Params& params, const Tensor& x) {
  const Launch own(work::pass_of(params), stream_of(x));
  std::vector<Tensor> kept;
  const auto memory = [&](int64_t count, ScalarType dtype) -> void* {
    const int64_t sizes[] = {count};
    return count == 0 ? nullptr : kept.emplace_back(empty(sizes, x, dtype)).data_ptr();
  };
  own.run(params, static_cast<float*>(memory(own.floats(), ScalarType::Float)), memory(own.ring_bytes(), ScalarType::Byte));
}

// hidden = act(gate) up, and gate and up or their factors, or two empty matrices.
std::vector<Tensor> gate(ForwardParams& params, const Tensor& x, const std::vector<Part>& parts, const std::vector<double>& act,
                         const std::string& keep) {
  const int64_t M = params.x.rows, F = parts[0].N();
  check(parts.size() == 2 && parts[1].N() == F, "gate and up must be two parts of the same out_features");
  const bool keeps = keep != "none";
  const std::vector<Tensor> results{padded_like(x, M, F), padded_like(x, keeps ? M : 0, F), padded_like(x, keeps ? M : 0, F)};
  params.gated = true;
  params.factors = keep == "factors";
  params.activation = activation_of(act);
  params.hidden = operand_of(results[0]);
  for (int i = 0; keeps && i < 2; ++i) params.part[i].y = operand_of(results[1 + i]);
  return results;
}

// Instead of dx those of gate and up, from what was kept of them; and act(gate) up again where that was themselves.
std::vector<Tensor> gate_backward(BackwardParams& params, const Tensor& x, const std::vector<double>& act, const std::vector<Tensor>& gated,
                                  bool factors, Readable& read) {
  const int64_t M = gated[0].size(0), F = gated[0].size(1);
  const std::vector<Tensor> results{padded_like(x, M, F), padded_like(x, M, F), padded_like(x, factors ? 0 : M, F)};
  params.gated = true;
  params.factors = factors;
  params.activation = activation_of(act);
  params.gate = read(with_stride_of(results[0], gated[0]));
  params.up = read(with_stride_of(results[0], gated[1]));
  params.dgate = operand_of(results[0]);
  params.dup = operand_of(results[1]);
  if (!factors) params.hidden = operand_of(results[2]);
  return results;
}

}  // namespace

std::vector<Tensor> lora_parts_forward(const Tensor& x, const std::vector<Part>& parts, double p, const std::vector<double>& act,
                                       const std::string& keep, const Routing& routing) {
  const OnDevice here(x);
  check_count(parts.size());
  check(x.numel() < kMostRows * x.size(-1), "x must have fewer than 2^31 - 256 rows");
  const int64_t M = x.numel() / x.size(-1);
  const bool few = takes_few_rows(M, parts, !act.empty(), routing);
  if (!few && !routing && keep == "none" && are_few_rows(M, parts, false)) return few_rows_forward(x, parts, act);
  Readable read(x.scalar_type());
  ForwardParams params{.x = read(flat(x)), .parts = static_cast<int>(parts.size())};
  check_routing(routing, parts, p, !act.empty(), x);
  params.window = static_cast<int>(routing.window);
  std::vector<Tensor> xas;
  for (size_t i = 0; i < parts.size(); ++i) {
    xas.push_back(empty_low(x, params.x.rows, parts[i].A.size(0), routing, i));
    params.part[i] = read_part(parts[i], xas[i], p, read);
    params.part[i].segments = segments_of(routing, i, parts[i].A);
  }
  std::vector<Tensor> results;
  if (act.empty()) {
    auto shape = sizes_of(x);
    for (size_t i = 0; i < parts.size(); ++i) {
      shape.back() = parts[i].N();
      results.push_back(empty(shape, x));
      params.part[i].y = dense_operand(results[i], shape.back());
    }
  } else {
    results = gate(params, x, parts, act, keep);
  }
  if (few) {
    check_cuda(sm90::launch_few_rows(params, stream_of(x)));
  } else {
    launch(params, x);
  }
  results.insert(results.end(), xas.begin(), xas.end());
  return results;
}

std::vector<Tensor> lora_parts_backward(const BackwardPass& pass) {
  const auto& [dys, xs, parts, xas, dxas, p, need_dx, needs, act, gated, factors, ys, routing] = pass;
  const size_t count = parts.size();
  check_count(count);
  check(dys.size() == count && xs.size() == count && xas.size() == count && dxas.size() == count && needs.size() == 3 * count,
              "dys, xs, xas and dxas must have an entry for each part, and needs three");
  check(ys.empty() || ys.size() == count, "ys must be empty or have an entry for each part");
  const bool gains = have_gains(parts);
  const Tensor& x = xs[0];
  const OnDevice here(x);
  check(!gains || current_card().capability == 90, "the kernels of this card know no gain backward");
  const bool few = !routing && !gains && act.empty() && !dxas[count - 1] && are_few_rows(x.numel() / x.size(-1), parts, true);
  if (few) return few_rows_backward(dys, x, parts, xas, need_dx, needs);
  Readable read(x.scalar_type());
  BackwardParams params{.parts = static_cast<int>(count)};
  check_routing(routing, parts, p, !act.empty(), x);
  params.window = static_cast<int>(routing.window);
  std::vector<Tensor> grads(3 * count + ys.size()), made;  // dAs, dBs, dbiases, dgains; dxas of this pass
  Tensor rows;
  for (size_t i = 0; i < count; ++i) {
    const Part& part = parts[i];
    check(!routing || !needs[2 * count + i], "rows with adapters of their own bring no sums of dy");
    const std::optional<Tensor> dxa = dxas[i];
    const bool summed = !dxa.has_value();
    check(i == 0 || !summed || params.summed == static_cast<int>(i), "parts with a dxa must come last");
    const int64_t K = part.K(), N = part.N(), r = part.A.size(0);
    const int64_t of_bias[] = {N};
    if (i == 0 || !are_same(xs[i], xs[i - 1])) rows = act.empty() ? rows_of(xs[i]) : flat(xs[i]);  // a gated pass reads no x
    params.summed += summed;
    made.push_back(dxa ? *dxa : empty_low(x, rows.size(0), r, routing, i));
    // dA, and dB or of slabs that of B^T, of the pass's windows alone.
    const int64_t ranks = routing ? routing.windows(i).size(0) * routing.window : r;
    const int64_t of_A[] = {ranks, K}, of_B[] = {routing ? ranks : N, routing ? N : ranks};
    const Tensor dA = grads[i] = grad_of(part.A, of_A, needs[i]);
    const Tensor dB = grads[count + i] = grad_of(part.B, of_B, needs[count + i]);
    const Tensor dbias = grads[2 * count + i] = grad_of(part.bias.value_or(x), of_bias, needs[2 * count + i]);
    Tensor weight = part.weight, B = part.B;
    check(!part.gain || !part.stored(), "a weight in a format is not multiplied by a gain backward");
    if (part.gain && summed && (need_dx || needs[i])) scale_rows(weight, B, part, need_dx, x);
    params.part[i] = {
        .dy = read(flat(dys[i])),
        .x = read.keep(rows),
        .weight = !summed ? Operand{} : part.stored() ? sizes_of_stored(part, x) : read(weight),
        .A = summed ? read(part.A) : operand_of(part.A),  // whose sizes alone matter elsewhere
        .B = summed ? read(B) : operand_of(B),
        .xa = read(xas[i]),
        .dxa = read(made[i]),
        .dA = dense_operand(dA, K),
        .dB = dense_operand(dB, of_B[1]),
        .dbias = dense_operand(dbias, N),
        .gain = gain_of(part),
        .scale = scale_of(part),
        .dropout = dropout_of(part.seed, p),
    };
    if (summed) params.part[i].stored = stored_of(part);
    params.part[i].segments = segments_of(routing, i, parts[i].A);
    if (!ys.empty()) grads[3 * count + i] = read_gain(params.part[i], part, ys[i], read);
  }
  if (!act.empty()) {
    std::vector<Tensor> results = gate_backward(params, x, act, gated, factors, read);
    launch(params, x);
    results.push_back(made[0]);
    return results;
  }
  const Tensor dx = grad_of(x, x.sizes(), need_dx);
  params.dx = dense_operand(dx, x.size(-1));
  launch(params, x);
  grads.insert(grads.begin(), dx);
  return grads;
}

}  // namespace fused_lora
