// From a pass's parameters to its kernel: which tile, which grid.
#pragma once

#include <algorithm>

#include "../shared_memory.h"
#include "../work/params.h"
#include "lora_linear.cuh"
#include "tiling.cuh"

namespace fused_lora::sm90 {

template <typename C, typename T, bool kBackward, bool kDrops>
cudaError_t launch(const KernelParams& p, cudaStream_t stream, int clusters) {
  constexpr int kSharedBytes = sizeof(Shared<C>);
  static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
  const cudaError_t error = allow_shared_memory<lora_linear_kernel<C, T, kBackward, kDrops>>(kSharedBytes);
  if (error != cudaSuccess) return error;
  lora_linear_kernel<C, T, kBackward, kDrops><<<kCluster * clusters, kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, bool kBackward, bool kDrops, bool kGated, bool kSegmented>
cudaError_t launch_tiles(const KernelParams& p, const Tiling& tiling, cudaStream_t stream) {
  const int clusters = std::min(tiling.workers, p.items);
  const auto call = [&](auto config) { return launch<decltype(config), T, kBackward, kDrops>(p, stream, clusters); };
  if constexpr (kGated) {
    return with_rank<256, kBackward ? Epilogue::kGateGrad : Epilogue::kGate, kSegmented>(tiling.rank, call);
  } else {
    return tiling.block_cols == 128 ? with_rank<128, Epilogue::kPlain, kSegmented>(tiling.rank, call)
                                    : with_rank<256, Epilogue::kPlain, kSegmented>(tiling.rank, call);
  }
}

template <bool kBackward, bool kDrops, bool kGated, bool kSegmented = false>
cudaError_t launch_pass(const KernelParams& p, const Tiling& tiling, DType dtype, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) return launch_tiles<__nv_bfloat16, kBackward, kDrops, kGated, kSegmented>(p, tiling, stream);
  return launch_tiles<__half, kBackward, kDrops, kGated, kSegmented>(p, tiling, stream);
}

// Each instantiated in a file of its own, so that they compile beside each other.
#define FUSED_LORA_LAUNCH_PASS(backward, drops, gated) \
  template cudaError_t launch_pass<backward, drops, gated>(const KernelParams&, const Tiling&, DType, cudaStream_t)
extern FUSED_LORA_LAUNCH_PASS(false, false, false);
extern FUSED_LORA_LAUNCH_PASS(false, true, false);
extern FUSED_LORA_LAUNCH_PASS(false, false, true);
extern FUSED_LORA_LAUNCH_PASS(false, true, true);
extern FUSED_LORA_LAUNCH_PASS(true, false, false);
extern FUSED_LORA_LAUNCH_PASS(true, true, false);
extern FUSED_LORA_LAUNCH_PASS(true, false, true);
extern FUSED_LORA_LAUNCH_PASS(true, true, true);
#define FUSED_LORA_LAUNCH_SEGMENTS(backward, drops, gated) \
  template cudaError_t launch_pass<backward, drops, gated, true>(const KernelParams&, const Tiling&, DType, cudaStream_t)
extern FUSED_LORA_LAUNCH_SEGMENTS(false, false, false);
extern FUSED_LORA_LAUNCH_SEGMENTS(false, true, false);
extern FUSED_LORA_LAUNCH_SEGMENTS(false, false, true);
extern FUSED_LORA_LAUNCH_SEGMENTS(true, false, false);
extern FUSED_LORA_LAUNCH_SEGMENTS(true, true, false);
extern FUSED_LORA_LAUNCH_SEGMENTS(true, false, true);

// The kernels of a pass.
template <bool kBackward>
auto launcher_of(const Pass& pass) {
  if (pass.segmented() && pass.gated) return launch_pass<kBackward, false, true, true>;
  if (pass.segmented()) return pass.drops ? launch_pass<kBackward, true, false, true> : launch_pass<kBackward, false, false, true>;
  if (pass.gated) return pass.drops ? launch_pass<kBackward, true, true> : launch_pass<kBackward, false, true>;
  return pass.drops ? launch_pass<kBackward, true, false> : launch_pass<kBackward, false, false>;
}

// Parameters that both passes have.
inline KernelParams params_of(const Pass& pass, const Workspace& workspace) {
  KernelParams p = work::params_of<KernelParams>(pass, workspace);
  p.finish_spacing = workspace.plan->finish_spacing;
  p.ring = workspace.plan->ring;
  p.ring_stride = work::ring_stride(pass, p.ring, workspace.plan->tiling.block_cols);
  return p;
}

// Tensor maps, and the first error among them.
struct MapMaker {
  cudaError_t error = cudaSuccess;

  CUtensorMap operator()(const Operand& matrix, int box_rows = kBox) {
    CUtensorMap map{};
    if (error == cudaSuccess) error = make_tensor_map(matrix, &map, box_rows);
    return map;
  }
};

// A weight, or its place in the ring: `rows` of it from `first_row` on, of as many columns as the ring has there.
inline void set_weight(KernelParams& p, Part& part, MapMaker& map, const Operand& weight, const Stored& stored, void* ring,
                       int64_t first_row, int64_t rows, int64_t cols) {
  part.stored = stored;
  part.ring = nullptr;
  if (!stored.exists() || p.ring.pieces == 0) {
    if (weight.data != nullptr) part.weight = map(weight);
    return;
  }
  part.ring = static_cast<uint16_t*>(ring) + first_row * p.ring_stride;
  part.weight = map({part.ring, weight.format, rows, cols, p.ring_stride});
}

// out (M, N), contiguous: by the copy engine where its rows are multiples of 16 bytes, else by the finisher.
inline void set_out(KernelParams& p, Part& part, MapMaker& map, const Operand& out) {
  if (out.stride % 8 == 0) {
    part.out = map(out);
  } else {
    part.out_data = static_cast<uint16_t*>(out.data);
    p.rows_start_anywhere = true;
  }
}

}  // namespace fused_lora::sm90
