// xa = scale x A^T, y = x W^T + xa B^T + bias.
#include "launch.cuh"

namespace fused_lora {
namespace sm90 {

FUSED_LORA_LAUNCH_PASS(false, false);

}  // namespace sm90

using namespace sm90;

int tile_width(int64_t M, int64_t N, int64_t r) {
  return wants_narrow_tiles(M, N, r, std::max(1, clusters_at_once())) ? 128 : 256;
}

int64_t forward_flags(int64_t M) { return 2 + ready_flags(M); }

cudaError_t launch_lora_linear_forward(const ForwardParams& f, cudaStream_t stream) {
  const Pass pass{f.x.rows, f.weight.rows, f.x.cols, f.A.rows, false, f.dropout.seed != nullptr, true, false, false};
  KernelParams p = params_of(pass, f.xa, f.scale, f.dropout, f.flags);
  MapMaker map{f.dtype};
  p.lhs = map(f.x);
  p.weight = map(f.weight);
  p.down = map(f.A);
  p.down_riding = map(f.A, 16);
  p.low = map(f.xa);
  p.up = map(f.B);
  set_out(p, map, f.y);
  if (map.error != cudaSuccess) return map.error;
  p.bias = f.bias;
  p.bias_dtype = f.bias_dtype;
  const auto launch = pass.drops ? launch_pass<false, true> : launch_pass<false, false>;
  return launch(p, pass, f.dtype, stream);
}

}  // namespace fused_lora
