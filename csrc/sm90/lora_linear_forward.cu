// xa = scale x A^T, y = gain (x W^T + xa B^T) + bias, of each linear that reads x.
#include "launch.cuh"

namespace fused_lora::sm90 {

FUSED_LORA_LAUNCH_PASS(false, false, false);

namespace {

void set_part(KernelParams& p, Part& part, MapMaker& map, const ForwardPart& f, const Operand& x, bool gated, const Workspace& workspace) {
  part.lhs = map(x);
  set_weight(p, part, map, f.weight, f.stored, workspace.ring, 0, p.ring.tiles * workspace.plan->tiling.block_cols, x.cols);
  if (part.r > 0) {
    part.down = map(f.A);
    part.low = map(f.xa);
    part.up = map(f.B);
  }
  if (!gated) set_out(p, part, map, f.y);
  part.low_data = f.xa.data;
  part.low_stride = f.xa.stride;
  part.scale = f.scale;
  part.gain = f.gain;
  part.bias = f.bias.data;
  part.bias_dtype = f.bias.format;
  part.dropout = f.dropout;
  part.segments = f.segments;
}

}  // namespace

work::Plan plan_pass(const Pass& pass, const Card& card) { return work::make_plan(pass, tiling_of(pass, clusters_of(card))); }

Tile tile_of(const Pass& pass, const Card& card) { return {kBlockM, wants_narrow_tiles(pass, clusters_of(card)) ? 128 : 256, kBox}; }

cudaError_t launch_forward(const ForwardParams& f, const Workspace& workspace, cudaStream_t stream) {
  const Pass pass = work::pass_of(f);
  KernelParams p = params_of(pass, workspace);
  MapMaker map;
  for (int i = 0; i < f.parts; ++i) set_part(p, p.part[i], map, f.part[i], f.x, f.gated, workspace);
  if (f.gated) {
    p.gated.gate = f.part[0].y.data;
    p.gated.up = f.part[1].y.data;
    p.gated.hidden = f.hidden.data;
    p.gated.stride = f.hidden.stride;
    p.gated.activation = f.activation;
    p.gated.factors = f.factors;
  }
  if (f.parts == 1 && p.part[0].r > 0 && f.window == 0) p.down_riding = map(f.part[0].A, 16);
  if (map.error != cudaSuccess) return map.error;
  return launcher_of<false>(pass)(p, workspace.plan->tiling, f.x.format, stream);
}

}  // namespace fused_lora::sm90
