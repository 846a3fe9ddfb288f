// xa = scale x A^T, y = gain (x W^T + xa B^T) + bias, of each linear that reads x.
#include "launch.cuh"

namespace fused_lora::sm80 {
namespace {

void set_part(Part& part, const ForwardPart& f, const Operand& x) {
  part.lhs = matrix_of(x);
  part.weight = matrix_of(f.weight);
  part.down = matrix_of(f.A);
  part.low = matrix_of(f.xa);
  part.up = matrix_of(f.B);
  part.out = matrix_of(f.y);
  part.scale = f.scale;
  part.dropout = f.dropout;
  part.segments = f.segments;
  part.gain = f.gain;
  part.bias = f.bias.data;
  part.bias_dtype = f.bias.format;
}

}  // namespace

work::Plan plan_pass(const Pass& pass, const Card& card) {
  const work::Plan plan = work::make_plan(pass, tiling_of(pass, card));
  return pass.segmented() ? plan : work::balanced(pass, plan);  // whose items' depths do not say where a half is
}

Tile tile_of(const Pass&, const Card&) { return {kBlockM, kBlockN, kDepth}; }

cudaError_t launch_forward(const ForwardParams& f, const Workspace& workspace, cudaStream_t stream) {
  const Pass pass = work::pass_of(f);
  KernelParams p = params_of(pass, workspace);
  for (int i = 0; i < f.parts; ++i) set_part(p.part[i], f.part[i], f.x);
  if (f.gated) {
    p.gated = {f.part[0].y.data, f.part[1].y.data, f.hidden.data, nullptr, nullptr, f.hidden.stride, f.activation, f.factors};
  }
  return launcher_of<false>(pass)(p, workspace.plan->tiling, f.x.format, stream);
}

FUSED_LORA_LAUNCH_RANKS(, false, false, false);

}  // namespace fused_lora::sm80
