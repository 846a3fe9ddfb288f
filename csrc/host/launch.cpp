#include "launch.h"

#include "capture.h"
#include "check.h"
#include "flags.h"
#include "nvtx_range.h"

namespace fused_lora {

Launch::Launch(const work::Pass& pass, cudaStream_t stream)
    : stream_(stream),
      captured_(capturing(stream)),
      planned_(planned(pass, captured_)),
      flags_(launch_flags(kCounters + planned_->plan.flags, stream, captured_)) {}

int64_t Launch::floats() const { return planned_->plan.floats(); }
int64_t Launch::ring_bytes() const { return planned_->plan.ring.bytes; }

void Launch::run(const ForwardParams& params, float* sums, void* ring) const {
  const NvtxRange range("forward");
  check_cuda(planned_->kernels->launch_forward(params, workspace(sums, ring), stream_));
}

void Launch::run(const BackwardParams& params, float* sums, void* ring) const {
  const NvtxRange range("backward");  // here: ranges are a thread's, and autograd's is another
  check_cuda(planned_->kernels->launch_backward(params, workspace(sums, ring), stream_));
}

Workspace Launch::workspace(float* sums, void* ring) const {
  return {.plan = &planned_->plan, .list = planned_->list, .flags = flags_, .partial = sums, .ring = ring};
}

}  // namespace fused_lora
