#include "capture.h"

#include <atomic>

#include "check.h"

namespace fused_lora {
namespace {

std::atomic<void (*)()> give_up{nullptr};

}  // namespace

// A destructor must not throw, and a capture that cannot be relaxed fails by itself.
RelaxedCapture::RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
RelaxedCapture::~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void give_up_memory_by(void (*function)()) { give_up.store(function); }

void* allocate(int64_t bytes, bool captured) {
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, bytes);
  void (*const function)() = give_up.load();
  if (error == cudaErrorMemoryAllocation && function != nullptr && !captured) {
    cudaGetLastError();
    function();
    error = cudaMalloc(&memory, bytes);
  }
  check_cuda(error);
  return memory;
}

void fill_now(const std::function<cudaError_t(cudaStream_t)>& fill) {
  cudaStream_t stream;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaError_t error = fill(stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  check_cuda(cudaStreamDestroy(stream));
  check_cuda(error);
}

}  // namespace fused_lora
