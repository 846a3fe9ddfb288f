// Items in two halves along their depth, whose sums are added up in order.
#pragma once

#include "plan.h"

namespace fused_lora::work {

// The first `shrinks` shrink items and the last `tiles` tiles of a list, as far as they can be halved.
void halve(const Pass& pass, Plan& plan, int shrinks, int tiles);

// The plan with as many halves as let workers end soonest: a shrink item takes about as long as a tile, whose ranks wait for it at
// first, and the last tiles leave workers idle.
Plan balanced(const Pass& pass, const Plan& plan);

}  // namespace fused_lora::work
