#include "flags.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "architecture.h"
#include "capture.h"
#include "check.h"

namespace fused_lora {
namespace {

constexpr int64_t kBlockInts = 1 << 20, kStreamInts = 1 << 12, kAlignment = 4;

int* zeroed_ints(int64_t count, bool captured) {
  const RelaxedCapture relaxed;
  void* memory = allocate(count * sizeof(int), captured);
  fill_now([&](cudaStream_t stream) { return cudaMemsetAsync(memory, 0, count * sizeof(int), stream); });
  return static_cast<int*>(memory);
}

// Zeroed memory of one device, given out and never taken back.
class Arena {
 public:
  int* take(int64_t count, bool captured) {
    count = (count + kAlignment - 1) / kAlignment * kAlignment;
    if (used_ + count > size_) grow(count, captured);
    int* taken = memory_ + used_;
    used_ += count;
    return taken;
  }

 private:
  void grow(int64_t count, bool captured) {
    const int64_t size = std::max(count, kBlockInts);
    memory_ = zeroed_ints(size, captured);
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
  static std::vector<Device> devices(count_devices());
  return devices.at(current_index());
}

}  // namespace

int* launch_flags(int64_t count, cudaStream_t stream, bool captured) {
  Device& device = current_device();
  const std::lock_guard<std::mutex> lock(device.mutex);
  if (captured) return device.arena.take(count, captured);
  unsigned long long id = 0;
  check_cuda(cudaStreamGetId(stream, &id));
  StreamFlags& own = device.streams[id];
  if (own.size < count) own = {device.arena.take(std::max(count, kStreamInts), captured), std::max(count, kStreamInts)};
  return own.flags;
}

}  // namespace fused_lora
