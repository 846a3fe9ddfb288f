// From a pass's parameters to its kernel: which tile, which grid.
#pragma once

#include <atomic>

#include "../lora_linear.h"
#include "lora_linear.cuh"
#include "plan.cuh"

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

// The chains' flags behind those of low, and their partial sums one after another from the first's on.
template <typename C>
void place_chains(KernelParams& p, const Pass& pass) {
  int* chain = p.next_item + p.flags;
  float* partial = p.part[0].dA.partial;
  for (int i = 0; i < pass.parts; ++i) {
    const PassPart& sizes = pass.part[i];
    Part& part = p.part[i];
    part.dA.chain = chain;
    part.dA.partial = partial;
    chain += sizes.wants_dA ? chain_flags<C>(sizes.cols) : 0;
    partial += sizes.wants_dA ? partial_floats<C>(sizes.cols) : 0;
    part.dB.chain = chain;
    part.dB.partial = partial;
    chain += sizes.wants_dB ? chain_flags<C>(sizes.depth) : 0;
    partial += sizes.wants_dB ? partial_floats<C>(sizes.depth) : 0;
    part.dB.sums_partial = partial;
    partial += sizes.wants_dB ? partial_cols<C>(sizes.depth) : 0;
  }
}

template <typename C, typename T, bool kBackward, bool kDrops>
cudaError_t launch(KernelParams p, const Pass& pass, int clusters, cudaStream_t stream) {
  p.schedule = make_schedule<C>(pass, clusters);
  p.flags = static_cast<int>(2 + pass.parts * ready_flags(pass.M));
  if constexpr (kBackward) place_chains<C>(p, pass);
  int items = 0;
  for (int step = p.schedule.first_step(); step < p.schedule.last_step(); ++step) items += p.schedule.size(step);

  if (items == 0) return cudaSuccess;

  constexpr int kSharedBytes = sizeof(Shared<C>);
  static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
  const cudaError_t error = allow_shared_memory<C, T, kBackward, kDrops>(kSharedBytes);
  if (error != cudaSuccess) return error;
  lora_linear_kernel<C, T, kBackward, kDrops><<<kCluster * std::min(clusters, items), kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, bool kBackward, bool kDrops, int kBlockN, Epilogue kEpilogue = Epilogue::kPlain>
cudaError_t launch_rank(const KernelParams& p, const Pass& pass, int clusters, cudaStream_t stream) {
  switch (block_rank(pass.most_rank())) {
    case 16: return launch<Config<kBlockN, 16, kEpilogue>, T, kBackward, kDrops>(p, pass, clusters, stream);
    case 64: return launch<Config<kBlockN, 64, kEpilogue>, T, kBackward, kDrops>(p, pass, clusters, stream);
    case 128: return launch<Config<kBlockN, 128, kEpilogue>, T, kBackward, kDrops>(p, pass, clusters, stream);
  }
  if constexpr (kEpilogue == Epilogue::kPlain) {
    return launch<Config<256, 256>, T, kBackward, kDrops>(p, pass, clusters, stream);  // which is never narrow
  }
  return cudaErrorInvalidValue;
}

template <typename T, bool kBackward, bool kDrops, bool kGated>
cudaError_t launch_tiles(const KernelParams& p, const Pass& pass, cudaStream_t stream) {
  const int clusters = clusters_at_once();
  if (clusters == 0) return cudaErrorInvalidDevice;
  if constexpr (kGated) {
    constexpr auto kEpilogue = kBackward ? Epilogue::kGateGrad : Epilogue::kGate;
    return launch_rank<T, kBackward, kDrops, 256, kEpilogue>(p, pass, clusters, stream);
  } else {
    if (wants_narrow_tiles(pass, clusters)) return launch_rank<T, kBackward, kDrops, 128>(p, pass, clusters, stream);
    return launch_rank<T, kBackward, kDrops, 256>(p, pass, clusters, stream);
  }
}

template <bool kBackward, bool kDrops, bool kGated>
cudaError_t launch_pass(const KernelParams& p, const Pass& pass, DType dtype, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) return launch_tiles<__nv_bfloat16, kBackward, kDrops, kGated>(p, pass, stream);
  return launch_tiles<__half, kBackward, kDrops, kGated>(p, pass, stream);
}

// Each instantiated in a file of its own, so that they compile beside each other.
#define FUSED_LORA_LAUNCH_PASS(backward, drops, gated) \
  template cudaError_t launch_pass<backward, drops, gated>(const KernelParams&, const Pass&, DType, cudaStream_t)
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

// Parameters that both passes have: sizes, and the flags, in the order in which KernelParams says they lie.
inline KernelParams params_of(const Pass& pass, int* flags) {
  KernelParams p{};
  p.M = static_cast<int>(pass.M);
  p.parts = pass.parts;
  p.summed = pass.summed;
  p.next_item = flags;
  p.exited = flags + 1;
  for (int i = 0; i < pass.parts; ++i) {
    Part& part = p.part[i];
    part.cols = static_cast<int>(pass.part[i].cols);
    part.depth = static_cast<int>(pass.part[i].depth);
    part.r = static_cast<int>(pass.part[i].r);
    part.ready = flags + 2 + i * ready_flags(pass.M);
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
