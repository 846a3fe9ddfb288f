// From the parameters of a pass to a launch of its kernel.
#pragma once

#include "lora_linear.cuh"

namespace fused_lora::sm90 {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Of a wave of clusters; one if the occupancy cannot be asked for.
template <typename Kernel>
cudaError_t clusters_at_once(Kernel kernel, int shared_bytes, int* clusters) {
  int device, sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  *clusters = sms / kCluster;
  return error;
}

template <typename T, bool kBackward, int kBlockN, int kBlockR>
cudaError_t launch(const KernelParams& p, cudaStream_t stream) {
  const auto kernel = lora_linear_kernel<T, kBackward, kBlockN, kBlockR>;
  constexpr int kSharedBytes = sizeof(Shared<kBlockN>);
  static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
  int clusters;
  const cudaError_t error = clusters_at_once(kernel, kSharedBytes, &clusters);
  if (error != cudaSuccess) return error;
  kernel<<<kCluster * min(clusters, p.schedule.total), kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, bool kBackward, int kBlockN>
cudaError_t launch_rank(const KernelParams& p, cudaStream_t stream) {
  if (p.r <= 16) return launch<T, kBackward, kBlockN, 16>(p, stream);
  if (p.r <= 64) return launch<T, kBackward, kBlockN, 64>(p, stream);
  if (p.r <= 128) return launch<T, kBackward, kBlockN, 128>(p, stream);
  return launch<T, kBackward, 256, 256>(p, stream);
}

}  // namespace fused_lora::sm90
