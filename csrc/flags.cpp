#include "flags.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <vector>

namespace fused_lora {
namespace {

constexpr int64_t kBlockInts = 1 << 20, kStreamInts = 1 << 14;

// Zeroed memory of one device, given out and never taken back.
class Arena {
 public:
  int* take(int64_t count) {
    if (used_ + count > size_) grow(count);
    int* taken = memory_ + used_;
    used_ += count;
    return taken;
  }

 private:
  // cudaMalloc and not torch's allocator: during a capture that would give memory of the graph's pool, and a launch that
  // zeroes it would be captured.
  void grow(int64_t count) {
    size_ = std::max(count, kBlockInts);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    cudaStream_t stream;
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    C10_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&memory_), size_ * sizeof(int)));
    C10_CUDA_CHECK(cudaMemsetAsync(memory_, 0, size_ * sizeof(int), stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream));
    C10_CUDA_CHECK(cudaStreamDestroy(stream));
    C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    used_ = 0;
  }

  int* memory_ = nullptr;
  int64_t used_ = 0, size_ = 0;
};

struct StreamFlags {
  int* flags = nullptr;
  int64_t size = 0;
};

struct Device {
  std::mutex mutex;
  Arena arena;
  std::map<cudaStream_t, StreamFlags> streams;
};

Device& current_device() {
  static std::vector<Device> devices(c10::cuda::device_count());
  return devices.at(c10::cuda::current_device());
}

}  // namespace

int* launch_flags(int64_t count) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  Device& device = current_device();
  const std::lock_guard<std::mutex> lock(device.mutex);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return device.arena.take(count);
  StreamFlags& own = device.streams[stream];
  if (own.size < count) own = {device.arena.take(std::max(count, kStreamInts)), std::max(count, kStreamInts)};
  return own.flags;
}

}  // namespace fused_lora
