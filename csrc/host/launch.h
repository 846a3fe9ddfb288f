// A launch: its list of work, its flags and its range. Knows memory and streams, nothing of torch.
#pragma once

#include <memory>

#include "plans.h"

namespace fused_lora {

class Launch {
 public:
  // Of a pass on the current device, with kernels for it.
  Launch(const work::Pass& pass, cudaStream_t stream);

  int64_t floats() const;  // of memory for its sums, which run() is given

  void run(const ForwardParams& params, float* sums) const;
  void run(const BackwardParams& params, float* sums) const;

 private:
  Workspace workspace(float* sums) const;

  cudaStream_t stream_;
  bool captured_;
  std::shared_ptr<const Planned> planned_;
  int* flags_;
};

}  // namespace fused_lora
