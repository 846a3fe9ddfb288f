#include "capture.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

namespace fused_lora {

RelaxedCapture::RelaxedCapture() { C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode_)); }
RelaxedCapture::~RelaxedCapture() { C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode_)); }

bool capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

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

void fill_now(const std::function<cudaError_t(cudaStream_t)>& fill) {
  cudaStream_t stream;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaError_t error = fill(stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  C10_CUDA_CHECK(error);
}

}  // namespace fused_lora
