// Flags that kernels raise and wait for: zeros that every launch leaves zero.
#pragma once

#include <cstdint>

namespace fused_lora {

// `count` zeros on the current device for one launch on the current stream. Launches on one stream share them, one after the
// other; a captured launch gets its own for good, since its graph may be replayed beside anything.
int* launch_flags(int64_t count);

}  // namespace fused_lora
