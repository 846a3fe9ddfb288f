// From a pass's parameters to its kernel: which stages, which grid.
#pragma once

#include <algorithm>

#include "../shared_memory.h"
#include "../work/halves.h"
#include "../work/params.h"
#include "lora_linear.cuh"
#include "tiling.cuh"

namespace fused_lora::sm80 {

inline Matrix matrix_of(const Operand& operand) { return {static_cast<const char*>(operand.data), static_cast<int>(operand.stride * 2)}; }

// Parameters that both passes have.
inline KernelParams params_of(const Pass& pass, const Workspace& workspace) {
  KernelParams p = work::params_of<KernelParams>(pass, workspace);
  p.rank = workspace.plan->tiling.rank;
  p.half_flags = workspace.plan->half_flags;
  p.half_sums = workspace.partial + workspace.plan->partials;
  p.row_flags = p.rank / workspace.plan->tiling.item_ranks;
  return p;
}

template <int kStages, int kBlockR, typename T, bool kBackward, bool kDrops, bool kGated, bool kSegmented>
cudaError_t launch(const KernelParams& p, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(std::conditional_t<kSegmented, SegmentedShared<kStages>, Shared<kStages>>);
  constexpr auto kKernel = lora_linear_kernel<kStages, kBlockR, T, kBackward, kDrops, kGated, kSegmented>;
  const cudaError_t error = allow_shared_memory<kKernel>(kBytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<KernelParams*>(&p)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kKernel), dim3(blocks), dim3(kThreads), arguments, kBytes, stream);
}

template <int kBlockR, typename T, bool kBackward, bool kDrops, bool kGated, bool kSegmented>
cudaError_t launch_stages(const KernelParams& p, const Tiling& tiling, cudaStream_t stream) {
  const int blocks = std::min(tiling.workers, p.items);
  if (tiling.stages == kMostStages) return launch<kMostStages, kBlockR, T, kBackward, kDrops, kGated, kSegmented>(p, blocks, stream);
  return launch<kFewStages, kBlockR, T, kBackward, kDrops, kGated, kSegmented>(p, blocks, stream);
}

// Instantiated in several files, so that they compile beside each other.
template <int kBlockR, bool kBackward, bool kDrops, bool kGated, bool kSegmented = false>
cudaError_t launch_rank(const KernelParams& p, const Tiling& tiling, DType dtype, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) return launch_stages<kBlockR, __nv_bfloat16, kBackward, kDrops, kGated, kSegmented>(p, tiling, stream);
  return launch_stages<kBlockR, __half, kBackward, kDrops, kGated, kSegmented>(p, tiling, stream);
}

#define FUSED_LORA_LAUNCH_RANK(rank, backward, drops, gated) \
  template cudaError_t launch_rank<rank, backward, drops, gated>(const KernelParams&, const Tiling&, DType, cudaStream_t)
#define FUSED_LORA_LAUNCH_RANKS(prefix, backward, drops, gated) \
  prefix FUSED_LORA_LAUNCH_RANK(16, backward, drops, gated);    \
  prefix FUSED_LORA_LAUNCH_RANK(64, backward, drops, gated);    \
  prefix FUSED_LORA_LAUNCH_RANK(128, backward, drops, gated)
FUSED_LORA_LAUNCH_RANKS(extern, false, false, false);
FUSED_LORA_LAUNCH_RANKS(extern, false, true, false);
FUSED_LORA_LAUNCH_RANKS(extern, false, false, true);
FUSED_LORA_LAUNCH_RANKS(extern, false, true, true);
FUSED_LORA_LAUNCH_RANKS(extern, true, false, false);
FUSED_LORA_LAUNCH_RANKS(extern, true, true, false);
FUSED_LORA_LAUNCH_RANKS(extern, true, false, true);
FUSED_LORA_LAUNCH_RANKS(extern, true, true, true);

// Whose items have a box of ranks.
#define FUSED_LORA_LAUNCH_SEGMENTS(backward) \
  template cudaError_t launch_rank<kSegmentedItemRanks, backward, false, false, true>(const KernelParams&, const Tiling&, DType, cudaStream_t)
extern FUSED_LORA_LAUNCH_SEGMENTS(false);
extern FUSED_LORA_LAUNCH_SEGMENTS(true);

template <bool kBackward>
cudaError_t launch_segments(const KernelParams& p, const Tiling& tiling, DType dtype, cudaStream_t stream) {
  if (p.items == 0) return cudaSuccess;
  return launch_rank<kSegmentedItemRanks, kBackward, false, false, true>(p, tiling, dtype, stream);
}

template <bool kBackward, bool kDrops, bool kGated>
cudaError_t launch_ranks(const KernelParams& p, const Tiling& tiling, DType dtype, cudaStream_t stream) {
  if (p.items == 0) return cudaSuccess;
  switch (tiling.item_ranks) {
    case 16: return launch_rank<16, kBackward, kDrops, kGated>(p, tiling, dtype, stream);
    case 64: return launch_rank<64, kBackward, kDrops, kGated>(p, tiling, dtype, stream);
    default: return launch_rank<128, kBackward, kDrops, kGated>(p, tiling, dtype, stream);
  }
}

// The kernels of a pass.
template <bool kBackward>
auto launcher_of(const Pass& pass) {
  if (pass.segmented()) return launch_segments<kBackward>;
  if (pass.gated) return pass.drops ? launch_ranks<kBackward, true, true> : launch_ranks<kBackward, false, true>;
  return pass.drops ? launch_ranks<kBackward, true, false> : launch_ranks<kBackward, false, false>;
}

}  // namespace fused_lora::sm80
