// From a pass's parameters to its kernel: which stages, which grid.
#pragma once

#include <algorithm>

#include "lora_linear.cuh"
#include "tiling.h"

namespace fused_lora::sm80 {

inline Matrix matrix_of(const Operand& operand) { return {static_cast<const char*>(operand.data), static_cast<int>(operand.stride * 2)}; }

static_assert(sizeof(work::Counters) == kCounters * sizeof(int), "they precede the flags");

inline KernelParams params_of(const Pass& pass, const Workspace& workspace) {
  KernelParams p{};
  p.list = workspace.list;
  p.items = static_cast<int>(workspace.plan->items.size());
  p.low_flags = workspace.plan->low_flags;
  p.chain_flags = workspace.plan->chain_flags;
  p.rank = workspace.plan->tiling.rank;
  p.row_flags = p.rank / workspace.plan->tiling.item_ranks;
  p.counters = reinterpret_cast<work::Counters*>(workspace.flags);
  p.flags = workspace.flags + kCounters;
  p.M = static_cast<int>(pass.M);
  p.parts = pass.parts;
  p.summed = pass.summed;
  for (int i = 0; i < pass.parts; ++i) {
    Part& part = p.part[i];
    part.cols = static_cast<int>(pass.part[i].cols);
    part.depth = static_cast<int>(pass.part[i].depth);
    part.r = static_cast<int>(pass.part[i].r);
  }
  return p;
}

template <int kStages, int kBlockR, typename T, bool kBackward>
cudaError_t launch(const KernelParams& p, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kStages>);
  const auto kernel = lora_linear_kernel<kStages, kBlockR, T, kBackward>;
  const void* entry = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<KernelParams*>(&p)};
  return cudaLaunchKernel(entry, dim3(blocks), dim3(kThreads), arguments, kBytes, stream);
}

// As many stages as fit: 6 in 163 KB, 4 in 99 KB.
template <int kBlockR, typename T, bool kBackward>
cudaError_t launch_stages(const KernelParams& p, const Tiling& tiling, cudaStream_t stream) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(tiling.workers, p.items);
  if (most >= static_cast<int>(sizeof(Shared<6>))) return launch<6, kBlockR, T, kBackward>(p, blocks, stream);
  return launch<4, kBlockR, T, kBackward>(p, blocks, stream);
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
