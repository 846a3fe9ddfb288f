// Of each linear that reads x: dxa = scale dy B, dA = dxa^T x, dB = dy^T xa, dbias = sum of dy; and of all of them together
// dx = sum of dy W + dxa A.
#include "launch.cuh"

namespace fused_lora {
namespace sm90 {

FUSED_LORA_LAUNCH_PASS(true, false, false);

namespace {

Pass pass_of(const BackwardParams& b) {
  Pass pass{b.part[0].dy.rows, true, b.part[0].dropout.seed != nullptr, b.needs_dx, b.gated, b.parts, b.summed, {}};
  for (int i = 0; i < b.parts; ++i) {
    const BackwardPart& part = b.part[i];
    pass.part[i] = {part.x.cols, part.dy.cols, part.A.rows, part.dA != nullptr, part.dB != nullptr || part.dbias != nullptr};
  }
  return pass;
}

void set_dA(Gradient& g, MapMaker& map, const BackwardPart& b, const CUtensorMap& low, bool makes_low, bool copied) {
  const Matrix& x = b.x;
  g.big = map(x);
  g.low = low;
  g.needs_low = makes_low;
  g.out = b.dA;
  g.stride_col = 1;
  g.stride_rank = x.cols;
  g.cols = static_cast<int>(x.cols);
  g.copied = copied && x.cols % 8 == 0;
  if (g.copied) g.result = map({b.dA, b.A.rows, x.cols, x.cols});
}

void set_dB(Gradient& g, MapMaker& map, const BackwardPart& b, const CUtensorMap& dy, bool copied) {
  const int64_t r = b.A.rows;
  g.big = dy;
  g.low = r > 0 ? map(b.xa) : dy;  // without factors: something that can be read, whose products nobody wants
  g.out = r > 0 ? b.dB : nullptr;
  g.sums = b.dbias;
  g.stride_col = r;
  g.stride_rank = 1;
  g.cols = static_cast<int>(b.dy.cols);
  g.copied = g.out != nullptr && copied && r % 8 == 0;
  if (g.copied) g.result = map({b.dB, b.dy.cols, r, r});
}

void set_part(Part& part, MapMaker& map, const BackwardPart& b, bool summed, bool copied) {
  part.lhs = map(b.dy);
  if (part.r > 0) part.low = map(b.dxa);
  if (summed) {
    part.weight = map(b.weight);
    if (part.r > 0) {
      part.down = map(b.B);
      part.up = map(b.A);
    }
  }
  if (b.dA != nullptr) set_dA(part.dA, map, b, part.low, summed, copied);
  if (b.dB != nullptr || b.dbias != nullptr) set_dB(part.dB, map, b, part.lhs, copied);
  part.scale = b.scale;
  part.dropout = b.dropout;
  part.bias_dtype = b.bias_dtype;
}

}  // namespace
}  // namespace sm90

using namespace sm90;

int64_t backward_flags(const BackwardParams& b) {
  int64_t flags = 2;
  for (int i = 0; i < b.parts; ++i) flags += ready_flags(b.part[i].x.rows) + most_chain_flags(b.part[i].x.cols) + most_chain_flags(b.part[i].dy.cols);
  return flags;
}

int64_t backward_partials(const BackwardParams& b) {
  int64_t most_rank = 0, floats = 0;
  for (int i = 0; i < b.parts; ++i) most_rank = std::max(most_rank, b.part[i].A.rows);
  for (int i = 0; i < b.parts; ++i) {
    const BackwardPart& part = b.part[i];
    const int64_t N = part.dy.cols;
    if (part.dA != nullptr) floats += most_partial_floats(part.x.cols, most_rank);
    if (part.dB != nullptr || part.dbias != nullptr) floats += most_partial_floats(N, most_rank) + most_partial_cols(N);
  }
  return floats;
}

cudaError_t launch_lora_linear_backward(const BackwardParams& b, cudaStream_t stream) {
  const Pass pass = pass_of(b);
  KernelParams p = params_of(pass, b.flags);
  MapMaker map{b.dtype};
  for (int i = 0; i < b.parts; ++i) set_part(p.part[i], map, b.part[i], i < b.summed, b.factor_dtype == b.dtype);
  if (b.gated) {
    p.gated = {b.gate.data, b.up.data, b.hidden.data, b.dgate.data, b.dup.data, b.gate.stride, b.activation, b.factors};
  } else if (b.needs_dx) {
    set_out(p, p.part[0], map, b.dx);
  }
  if (map.error != cudaSuccess) return map.error;
  p.part[0].dA.partial = b.partial;
  p.factor_dtype = b.factor_dtype;
  return launcher_of<true>(pass)(p, pass, b.dtype, stream);
}

}  // namespace fused_lora
