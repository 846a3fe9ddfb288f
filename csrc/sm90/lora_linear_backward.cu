// Of each linear that reads x: dxa = scale dy B, dA = dxa^T x, dB = gain dy^T xa, dbias = sum of dy,
// dgain = sum of dy (y - bias) / gain; and of all of them together dx = sum of dy W + dxa A.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_PASS(true, false, false);

namespace {

// Whether the copy engine can write a factor's gradient.
bool is_copied(const Operand& grad, const Operand& x) { return grad.format == x.format && grad.cols % 8 == 0; }

void set_dA(Gradient& g, MapMaker& map, const BackwardPart& b, const CUtensorMap& low) {
  const Operand& x = b.x;
  g.big = map(x);
  g.low = low;
  g.out = b.dA.data;
  g.stride_col = 1;
  g.stride_rank = x.cols;
  g.cols = static_cast<int>(x.cols);
  g.copied = is_copied(b.dA, x);
  if (g.copied) g.result = map(b.dA);
}

void set_dB(Gradient& g, MapMaker& map, const BackwardPart& b, const CUtensorMap& dy) {
  const int64_t r = b.A.rows;
  g.big = dy;
  g.low = r > 0 ? map(b.xa) : dy;  // without factors: something that can be read, whose products nobody wants
  g.out = r > 0 ? b.dB.data : nullptr;
  g.sums = b.dbias.data;
  const bool slabs = b.segments.blocks != nullptr;  // of which dB is one of B^T
  g.stride_col = slabs ? 1 : b.dB.cols;
  g.stride_rank = slabs ? b.dB.cols : 1;
  g.cols = static_cast<int>(b.dy.cols);
  g.copied = g.out != nullptr && is_copied(b.dB, b.dy);
  if (g.copied) g.result = map(b.dB);
}

void set_part(Part& part, MapMaker& map, const BackwardPart& b, bool summed) {
  part.lhs = map(b.dy);
  if (part.r > 0) part.low = map(b.dxa);
  if (summed) {
    if (part.r > 0) {
      part.down = map(b.B);
      part.up = map(b.A);
    }
  }
  if (b.dA.data != nullptr) set_dA(part.dA, map, b, part.low);
  if (work::wants_dB(b)) set_dB(part.dB, map, b, part.lhs);
  part.scale = b.scale;
  part.dropout = b.dropout;
  part.segments = b.segments;
  part.gain = b.gain;
  part.dgain = b.dgain;
  if (b.dgain != nullptr) part.y = map(b.y);
  part.bias = b.bias.data;
  part.bias_dtype = b.dbias.format;
}

}  // namespace

cudaError_t launch_backward(const BackwardParams& b, const Workspace& workspace, cudaStream_t stream) {
  const Pass pass = work::pass_of(b);
  KernelParams p = params_of(pass, workspace);
  MapMaker map;
  int64_t ring_row = 0;
  for (int i = 0; i < b.parts; ++i) {
    const BackwardPart& part = b.part[i];
    set_part(p.part[i], map, part, i < b.summed);
    if (i >= b.summed) continue;
    set_weight(p, p.part[i], map, part.weight, part.stored, workspace.ring, ring_row, part.weight.rows, p.ring_stride);
    ring_row += part.weight.rows;
  }
  if (b.gated) {
    p.gated = {b.gate.data, b.up.data, b.hidden.data, b.dgate.data, b.dup.data, b.gate.stride, b.activation, b.factors};
  } else if (b.dx.data != nullptr) {
    set_out(p, p.part[0], map, b.dx);
  }
  if (map.error != cudaSuccess) return map.error;
  const Tiling& tiling = workspace.plan->tiling;
  work::place_partials(p, pass, tiling, workspace.partial);
  p.factor_dtype = b.part[0].dA.format;
  if (p.items == 0) return cudaSuccess;
  return launcher_of<true>(pass)(p, tiling, b.part[0].dy.format, stream);
}

}  // namespace fused_lora::sm90
