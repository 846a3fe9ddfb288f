// Of each linear that reads x: dxa = scale dy B, dA = dxa^T x, dB = dy^T xa; and of all of them together dx = sum of dy W + dxa A.
#include "launch.cuh"

namespace fused_lora::sm80 {
namespace {

void set_part(Part& part, const BackwardPart& b, const Operand& dx) {
  part.lhs = matrix_of(b.dy);
  part.weight = matrix_of(b.weight);
  part.down = matrix_of(b.B);
  part.low = matrix_of(b.dxa);
  part.up = matrix_of(b.A);
  part.out = matrix_of(dx);
  part.scale = b.scale;
  part.dropout = b.dropout;
  part.segments = b.segments;
  part.dA = {matrix_of(b.x), part.low, b.dA.data, 1, b.x.cols, static_cast<int>(b.x.cols)};
  // With segments, that of a slab of B^T.
  const bool segmented = b.segments.levels > 0;
  const int64_t stride_col = segmented ? 1 : b.A.rows, stride_rank = segmented ? b.dy.cols : 1;
  // Without factors: something that can be read, whose products nobody wants.
  part.dB = {part.lhs, b.A.rows > 0 ? matrix_of(b.xa) : part.lhs, b.dB.data, stride_col, stride_rank,
             static_cast<int>(b.dy.cols)};
  part.dB.sums = b.dbias.data;
  part.bias_dtype = b.dbias.format;
}

}  // namespace

cudaError_t launch_backward(const BackwardParams& b, const Workspace& workspace, cudaStream_t stream) {
  const Pass pass = work::pass_of(b);
  KernelParams p = params_of(pass, workspace);
  for (int i = 0; i < b.parts; ++i) set_part(p.part[i], b.part[i], b.dx);
  work::place_partials(p, pass, workspace.plan->tiling, workspace.partial);
  if (b.gated) p.gated = {b.gate.data, b.up.data, b.hidden.data, b.dgate.data, b.dup.data, b.gate.stride, b.activation, b.factors};
  p.factor_dtype = b.part[0].dA.format;
  return launcher_of<true>(pass)(p, workspace.plan->tiling, b.part[0].dy.format, stream);
}

FUSED_LORA_LAUNCH_RANKS(, true, false, false);

}  // namespace fused_lora::sm80
