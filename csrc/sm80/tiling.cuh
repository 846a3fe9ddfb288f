// How the kernels for compute capability 8 cut a pass. Host code; nothing here touches a device.
#pragma once

#include "../work/plan.h"
#include "stage.cuh"

namespace fused_lora::sm80 {

using work::Pass;
using work::Tiling;

constexpr int kMostItemRanks = 128, kSegmentedItemRanks = 64;

// Items of 256 rows by 128 columns, half of them gate's and half up's where these are made; of gradients 256 columns; each block is
// one writer.
inline Tiling tiling_of(const Pass& pass, const Card& card) {
  constexpr int kGradientCols = 256, kOwn = 1024;  // bytes beside the stages
  const int rank = work::block_rank(pass.most_rank()), item_ranks = std::min(rank, pass.segmented() ? kSegmentedItemRanks : kMostItemRanks);
  const bool fits = card.shared_bytes >= kMostStages * kStageBytes + kOwn;
  const int stages = fits && has_kernels(kMostStages, card.capability) ? kMostStages : kFewStages;
  const int tile_cols = pass.gated && !pass.backward ? kBlockN / 2 : kBlockN;
  // Tiles that begin later than their neighbours read again what an L2 of 6 MB has forgotten.
  const bool cuts_shrinks = card.capability != 86;
  return {kBlockM, kBlockN, tile_cols, rank, item_ranks, false, cuts_shrinks, kGradientCols, kBlockM, 1, false, card.sms, stages};
}

}  // namespace fused_lora::sm80
