// From a pass's parameters to its kernel: which tile, which grid.
#pragma once

#include <algorithm>
#include <atomic>

#include "../lora_linear.h"
#include "lora_linear.cuh"
#include "tiling.cuh"

namespace fused_lora::sm90 {

// Clusters that run at once on the current device; 0 if it cannot be asked.
inline int clusters_at_once() {
  int device = 0, sms = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return sms / kCluster;
}

// Allows the kernel its shared memory on the current device: once, since that takes as long as half a launch.
template <typename C, typename T, bool kBackward, bool kDrops>
cudaError_t allow_shared_memory(int bytes) {
  constexpr int kDevices = 64;
  static std::atomic<bool> allowed[kDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < kDevices && allowed[device].load())) return error;
  error = cudaFuncSetAttribute(lora_linear_kernel<C, T, kBackward, kDrops>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kDevices) allowed[device].store(true);
  return error;
}

// Partial sums of gradients lie one after another.
inline void place_partials(KernelParams& p, const Pass& pass, const Tiling& tiling, float* partial) {
  for (int i = 0; i < pass.parts; ++i) {
    const work::PassPart& sizes = pass.part[i];
    Part& part = p.part[i];
    part.dA.partial = partial;
    partial += sizes.wants_dA ? work::partial_floats(tiling, sizes.cols) : 0;
    part.dB.partial = partial;
    partial += sizes.wants_dB ? work::partial_floats(tiling, sizes.depth) : 0;
    part.dB.sums_partial = partial;
    partial += sizes.wants_dB ? work::partial_cols(tiling, sizes.depth) : 0;
  }
}

template <typename C, typename T, bool kBackward, bool kDrops>
cudaError_t launch(const KernelParams& p, cudaStream_t stream, int clusters) {
  constexpr int kSharedBytes = sizeof(Shared<C>);
  static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
  const cudaError_t error = allow_shared_memory<C, T, kBackward, kDrops>(kSharedBytes);
  if (error != cudaSuccess) return error;
  lora_linear_kernel<C, T, kBackward, kDrops><<<kCluster * clusters, kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, bool kBackward, bool kDrops, bool kGated>
cudaError_t launch_tiles(const KernelParams& p, const Tiling& tiling, cudaStream_t stream) {
  const int clusters = std::min(tiling.workers, p.items);
  const auto call = [&](auto config) { return launch<decltype(config), T, kBackward, kDrops>(p, stream, clusters); };
  if constexpr (kGated) {
    return with_rank<256, kBackward ? Epilogue::kGateGrad : Epilogue::kGate>(tiling.rank, call);
  } else {
    return tiling.block_cols == 128 ? with_rank<128, Epilogue::kPlain>(tiling.rank, call) : with_rank<256, Epilogue::kPlain>(tiling.rank, call);
  }
}

template <bool kBackward, bool kDrops, bool kGated>
cudaError_t launch_pass(const KernelParams& p, const Tiling& tiling, DType dtype, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) return launch_tiles<__nv_bfloat16, kBackward, kDrops, kGated>(p, tiling, stream);
  return launch_tiles<__half, kBackward, kDrops, kGated>(p, tiling, stream);
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

// The kernels of a pass.
template <bool kBackward>
auto launcher_of(const Pass& pass) {
  if (pass.gated) return pass.drops ? launch_pass<kBackward, true, true> : launch_pass<kBackward, false, true>;
  return pass.drops ? launch_pass<kBackward, true, false> : launch_pass<kBackward, false, false>;
}

static_assert(sizeof(work::Counters) == kCounters * sizeof(int), "they precede the flags");

// Parameters that both passes have.
inline KernelParams params_of(const Pass& pass, const Workspace& workspace) {
  KernelParams p{};
  p.list = workspace.list;
  p.items = static_cast<int>(workspace.plan->items.size());
  p.low_flags = workspace.plan->low_flags;
  p.chain_flags = workspace.plan->chain_flags;
  p.counters = reinterpret_cast<work::Counters*>(workspace.flags);
  p.flags = workspace.flags + kCounters;
  p.finish_spacing = workspace.plan->finish_spacing;
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

// Tensor maps, and the first error among them.
struct MapMaker {
  cudaError_t error = cudaSuccess;

  CUtensorMap operator()(const Operand& matrix, int box_rows = kBox) {
    CUtensorMap map{};
    if (error == cudaSuccess) error = make_tensor_map(matrix, &map, box_rows);
    return map;
  }
};

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
