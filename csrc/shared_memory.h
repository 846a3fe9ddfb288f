// Allows kernels their shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace fused_lora {

// On the current device: once, since that takes as long as half a launch.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  constexpr int kDevices = 64;
  static std::atomic<bool> allowed[kDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < kDevices && allowed[device].load())) return error;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kDevices) allowed[device].store(true);
  return error;
}

}  // namespace fused_lora
