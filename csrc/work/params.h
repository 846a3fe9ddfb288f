// What the kernels' parameters have in common, whatever the architecture.
#pragma once

#include "plan.h"

namespace fused_lora::work {

static_assert(sizeof(Counters) == kCounters * sizeof(int), "they precede the flags");

template <typename Params>
Params params_of(const Pass& pass, const Workspace& workspace) {
  Params p{};
  p.list = workspace.list;
  p.items = static_cast<int>(workspace.plan->items.size());
  p.low_flags = workspace.plan->low_flags;
  p.chain_flags = workspace.plan->chain_flags;
  p.counters = reinterpret_cast<Counters*>(workspace.flags);
  p.flags = workspace.flags + kCounters;
  p.M = static_cast<int>(pass.M);
  p.parts = pass.parts;
  p.summed = pass.summed;
  for (int i = 0; i < pass.parts; ++i) {
    p.part[i].cols = static_cast<int>(pass.part[i].cols);
    p.part[i].depth = static_cast<int>(pass.part[i].depth);
    p.part[i].r = static_cast<int>(pass.part[i].r);
  }
  return p;
}

// Partial sums of gradients lie one after another.
template <typename Params>
void place_partials(Params& p, const Pass& pass, const Tiling& tiling, float* partial) {
  for (int i = 0; i < pass.parts; ++i) {
    const PassPart& sizes = pass.part[i];
    auto& part = p.part[i];
    part.dA.partial = partial;
    partial += sizes.wants_dA ? partial_floats(tiling, pass, sizes.cols) : 0;
    part.dB.partial = partial;
    partial += sizes.wants_dB ? partial_floats(tiling, pass, sizes.depth) : 0;
    part.dB.sums_partial = partial;
    partial += sizes.wants_dB ? kSums * partial_cols(tiling, sizes.depth) : 0;
  }
}

}  // namespace fused_lora::work
