// From a pass's parameters to its kernel: which stages, which grid.
#pragma once

#include <algorithm>

#include "../shared_memory.h"
#include "../work/params.h"
#include "lora_linear.cuh"
#include "tiling.cuh"

namespace fused_lora::sm80 {

inline Matrix matrix_of(const Operand& operand) { return {static_cast<const char*>(operand.data), static_cast<int>(operand.stride * 2)}; }

// Parameters that both passes have.
inline KernelParams params_of(const Pass& pass, const Workspace& workspace) {
  KernelParams p = work::params_of<KernelParams>(pass, workspace);
  p.rank = workspace.plan->tiling.rank;
  p.row_flags = p.rank / workspace.plan->tiling.item_ranks;
  return p;
}

template <int kStages, int kBlockR, typename T, bool kBackward>
cudaError_t launch(const KernelParams& p, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kStages>);
  constexpr auto kKernel = lora_linear_kernel<kStages, kBlockR, T, kBackward>;
  const cudaError_t error = allow_shared_memory<kKernel>(kBytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<KernelParams*>(&p)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kKernel), dim3(blocks), dim3(kThreads), arguments, kBytes, stream);
}

template <int kBlockR, typename T, bool kBackward>
cudaError_t launch_stages(const KernelParams& p, const Tiling& tiling, cudaStream_t stream) {
  const int blocks = std::min(tiling.workers, p.items);
  if (tiling.stages == kMostStages) return launch<kMostStages, kBlockR, T, kBackward>(p, blocks, stream);
  return launch<kFewStages, kBlockR, T, kBackward>(p, blocks, stream);
}

template <typename T, bool kBackward>
cudaError_t launch_rank(const KernelParams& p, const Tiling& tiling, cudaStream_t stream) {
  switch (tiling.item_ranks) {
    case 16: return launch_stages<16, T, kBackward>(p, tiling, stream);
    case 64: return launch_stages<64, T, kBackward>(p, tiling, stream);
    default: return launch_stages<128, T, kBackward>(p, tiling, stream);
  }
}

template <bool kBackward>
cudaError_t launch_pass(const KernelParams& p, const Tiling& tiling, DType dtype, cudaStream_t stream) {
  if (p.items == 0) return cudaSuccess;
  if (dtype == DType::kBFloat16) return launch_rank<__nv_bfloat16, kBackward>(p, tiling, stream);
  return launch_rank<__half, kBackward>(p, tiling, stream);
}

}  // namespace fused_lora::sm80
