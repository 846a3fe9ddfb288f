// Lists of work on the device, made once for all passes of the same sizes.
#pragma once

#include <memory>

#include "architecture.h"

namespace fused_lora {

struct Planned {
  work::Plan plan;
  work::Item* list;  // plan.items, on the device
  const Kernels* kernels;  // which it was made for
};

// Of a pass on the current device. Whoever launches it holds it until then; of a launch that is captured, it is kept for good.
std::shared_ptr<const Planned> planned(const work::Pass& pass, bool captured);

}  // namespace fused_lora
