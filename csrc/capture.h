// Work on a device that no capture sees: allowed while a graph is captured, and done when it returns.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

namespace fused_lora {

// What is done in its scope is never captured, and allowed during a capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode_)); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Of the current stream.
inline bool capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Memory of the current device that torch's allocator knows nothing of: during a capture that would give memory of the graph's
// pool. What it keeps unused is given up for it, as for its own allocations.
void* allocate(int64_t bytes);

// fill(stream) on a stream of its own, since one of torch's pool may be the one that is capturing; waits for it.
template <typename Fill>
void fill_now(Fill fill) {
  cudaStream_t stream;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaError_t error = fill(stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  C10_CUDA_CHECK(error);
}

}  // namespace fused_lora
