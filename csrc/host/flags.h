// Counters, and flags that kernels raise and wait for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fused_lora {

// `count` ints on the current device for one launch on a stream, zero before the first launch that uses them, aligned
// to 16 bytes. Launches on one stream share them, one after the other; a captured launch gets its own for good, since its graph
// may be replayed beside anything.
int* launch_flags(int64_t count, cudaStream_t stream, bool captured);

}  // namespace fused_lora
