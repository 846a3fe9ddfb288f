// From the parameters of a pass to a launch of its kernel.
#pragma once

#include "lora_linear.cuh"

namespace fused_lora::sm90 {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

template <typename C, typename T, bool kBackward>
cudaError_t launch(const KernelParams& p, int items, cudaStream_t stream) {
  const auto kernel = lora_linear_kernel<C, T, kBackward>;
  constexpr int kSharedBytes = sizeof(Shared<C>);
  static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
  int device, sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
#ifdef PDL
  cudaLaunchConfig_t config{dim3(kCluster * min(sms / kCluster, items)), dim3(kThreads), kSharedBytes, stream};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute; config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
#else
  kernel<<<kCluster * min(sms / kCluster, items), kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
#endif
}

}  // namespace fused_lora::sm90
