// Work on a device that no capture sees: allowed while a graph is captured, and done when it returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

namespace fused_lora {

// What is done in its scope is never captured, and allowed during a capture.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Whether a stream is captured.
bool capturing(cudaStream_t stream);

// Memory of the current device that torch's allocator knows nothing of: during a capture that would give memory of the graph's
// pool. What torch keeps unused is given up for it, as for its own allocations; not where `captured`, since a capture would not
// survive it.
void* allocate(int64_t bytes, bool captured);

// How torch gives up what it keeps unused; where nobody said it, it keeps it.
void give_up_memory_by(void (*give_up)());

// fill(stream) on a stream of its own, since one of torch's pool may be the one that is capturing; waits for it.
void fill_now(const std::function<cudaError_t(cudaStream_t)>& fill);

}  // namespace fused_lora
