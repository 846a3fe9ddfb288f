#include "flags.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

namespace fused_lora {
namespace {

constexpr int64_t kBlockInts = 1 << 20, kStreamInts = 1 << 12;

// What is done in its scope is never captured, and allowed during a capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode_)); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

bool capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// cudaMalloc and not torch's allocator: during a capture that would give memory of the graph's pool, and the launch that zeroes it
// would be captured. What torch's allocator keeps unused is given up for it, as for its own allocations.
int* zeroed_ints(int64_t count) {
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, count * sizeof(int));
  if (error == cudaErrorMemoryAllocation && !capturing()) {
    cudaGetLastError();
    c10::cuda::CUDACachingAllocator::emptyCache();
    error = cudaMalloc(&memory, count * sizeof(int));
  }
  C10_CUDA_CHECK(error);
  cudaStream_t stream;  // of its own: one of torch's pool may be the one that is capturing
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  error = cudaMemsetAsync(memory, 0, count * sizeof(int), stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  C10_CUDA_CHECK(error);
  return static_cast<int*>(memory);
}

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
  void grow(int64_t count) {
    const int64_t size = std::max(count, kBlockInts);
    memory_ = zeroed_ints(size);
    size_ = size;
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
  std::map<unsigned long long, StreamFlags> streams;  // by their ids: handles are used again, and one may mean several streams
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
  if (capturing()) return device.arena.take(count);
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetId(stream, &id));
  StreamFlags& own = device.streams[id];
  if (own.size < count) own = {device.arena.take(std::max(count, kStreamInts)), std::max(count, kStreamInts)};
  return own.flags;
}

}  // namespace fused_lora
