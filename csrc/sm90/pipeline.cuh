// Shared memory of a block, and the ring of stages between the thread that loads and the two warpgroups that multiply.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.cuh"
#include "../ptx/sync.cuh"
#include "../ptx/tma.cuh"
#include "tensor_map.h"

namespace fused_lora::sm90 {

constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

template <int kBlockN>
struct Shared {
  static constexpr int kStageBoxes = 2 + kBlockN / kBox;  // 128 rows of one operand, kBlockN of the other
  static constexpr int kStages = kBlockN == 256 ? 4 : 6;

  uint8_t stages[kStages][kStageBoxes * kBoxBytes];
  uint8_t out[kConsumers][2][kBoxBytes];
  uint64_t full[kStages], empty[kStages];
  uint64_t item_full, item_empty;  // item_empty counts in the first block of the cluster
  int item;
};

template <typename SharedT>
__device__ void init_barriers(SharedT& shared) {
  constexpr int kWarps = kConsumers * kWarpgroup / 32;
  for (int stage = 0; stage < SharedT::kStages; ++stage) {
    ptx::mbarrier_init(&shared.full[stage], 1);
    ptx::mbarrier_init(&shared.empty[stage], kCluster * kWarps);
  }
  ptx::mbarrier_init(&shared.item_full, 1);
  ptx::mbarrier_init(&shared.item_empty, kCluster * (kWarps + 1));
  ptx::fence_mbarrier_init();
}

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fused_lora::sm90
