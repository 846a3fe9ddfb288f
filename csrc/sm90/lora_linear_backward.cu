// dxa = scale dy B, dx = dy W + dxa A, dA = dxa^T x, dB = dy^T xa, dbias = sum of dy.
#include "launch.cuh"

namespace fused_lora {
namespace sm90 {

FUSED_LORA_LAUNCH_PASS(true, false);

}  // namespace sm90

using namespace sm90;

int64_t backward_flags(int64_t M, int64_t K, int64_t N) {
  return 2 + ready_flags(M) + most_chain_flags(K) + most_chain_flags(N);
}

int64_t backward_partials(int64_t K, int64_t N, int64_t r) {
  return most_partial_floats(K, r) + most_partial_floats(N, r) + most_partial_cols(N);
}

cudaError_t launch_lora_linear_backward(const BackwardParams& b, cudaStream_t stream) {
  const bool drops = b.dropout.seed != nullptr, works_on_dB = b.needs_dB || b.needs_dbias;
  const Pass pass{b.dy.rows, b.weight.cols, b.dy.cols, b.A.rows, true, drops, b.needs_dx, b.needs_dA, works_on_dB};
  KernelParams p = params_of(pass, b.dxa, b.scale, b.dropout, b.flags);
  MapMaker map{b.dtype};
  p.lhs = map(b.dy);
  p.weight = map(b.weight);
  p.down = map(b.B);
  p.low = map(b.dxa);
  p.up = map(b.A);
  if (b.needs_dx) set_out(p, map, b.dx);
  const bool copied = b.factor_dtype == b.dtype;
  if (b.needs_dA) {
    p.dA.big = map(b.x);
    p.dA.low = p.low;
    p.dA.needs_low = true;
    p.dA.out = b.dA;
    p.dA.stride_col = 1;
    p.dA.stride_rank = b.x.cols;
    p.dA.cols = p.N;
    p.dA.copied = copied && b.x.cols % 8 == 0;
    if (p.dA.copied) p.dA.result = map({b.dA, p.r, b.x.cols, b.x.cols});
  }
  if (works_on_dB) {
    p.dB.big = p.lhs;
    p.dB.low = map(b.xa);
    p.dB.out = b.needs_dB ? b.dB : nullptr;
    p.dB.sums = b.needs_dbias ? b.dbias : nullptr;
    p.dB.stride_col = p.r;
    p.dB.stride_rank = 1;
    p.dB.cols = p.K;
    p.dB.copied = b.needs_dB && copied && p.r % 8 == 0;
    if (p.dB.copied) p.dB.result = map({b.dB, b.dy.cols, p.r, p.r});
  }
  if (map.error != cudaSuccess) return map.error;
  p.dA.partial = b.partial;
  p.factor_dtype = b.factor_dtype;
  p.bias_dtype = b.bias_dtype;
  const auto launch = pass.drops ? launch_pass<true, true> : launch_pass<true, false>;
  return launch(p, pass, b.dtype, stream);
}

}  // namespace fused_lora
