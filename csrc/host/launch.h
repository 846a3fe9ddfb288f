// A launch: its list of work, its flags and its range. Knows memory and streams, nothing of torch.
#pragma once

#include <memory>

#include "plans.h"

namespace fused_lora {

class Launch {
 public:
  // Of a pass on the current device, with kernels for it.
  Launch(const work::Pass& pass, cudaStream_t stream);

  // Of memory for its sums and for weights that are dequantised, which run() is given.
  int64_t floats() const;
  int64_t ring_bytes() const;

  void run(const ForwardParams& params, float* sums, void* ring) const;
  void run(const BackwardParams& params, float* sums, void* ring) const;

 private:
  Workspace workspace(float* sums, void* ring) const;

  cudaStream_t stream_;
  bool captured_;
  std::shared_ptr<const Planned> planned_;
  int* flags_;
};

}  // namespace fused_lora
