#include "capture.h"

#include <c10/cuda/CUDACachingAllocator.h>

namespace fused_lora {

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation && !capturing()) {
    cudaGetLastError();
    c10::cuda::CUDACachingAllocator::emptyCache();
    error = cudaMalloc(&memory, bytes);
  }
  C10_CUDA_CHECK(error);
  return memory;
}

}  // namespace fused_lora
