// Which kernel takes a pass, and how that one cuts it. Host code; nothing here touches a device.
#pragma once

#include <algorithm>

#include "../work/plan.h"
#include "pipeline.cuh"

namespace fused_lora::sm90 {

using work::Pass;
using work::Tiling;

// That run at once.
inline int clusters_of(const Card& card) { return std::max(1, card.sms / kCluster); }

// Tiles of 128 columns take 0.56 of the time of those of 256 and fill a wave where there are few.
inline bool wants_narrow_tiles(const Pass& pass, int clusters) {
  const int64_t items = ceil_div(pass.M, kPairRows);
  const int wide_waves = ceil_div(items * pass.tile_cols(256), clusters), narrow_waves = ceil_div(items * pass.tile_cols(128), clusters);
  return !pass.gated && !pass.dequantises() && pass.most_rank() <= 128 && 0.56 * narrow_waves < wide_waves;
}

template <typename C>
Tiling tiling_of(int clusters) {
  return {kPairRows, C::kBlockN, C::kTileCols, C::kBlockR, C::kBlockR, true, false, kCluster * C::kGradientCols, kFlagRows, kChainFlags, C::kCanRide, clusters, C::kStages};
}

// call(C{}) for the kernels' C that pads ranks so; what is made for ranks above 128 is never narrow, nor gated.
template <int kBlockN, Epilogue kEpilogue, bool kSegmented = false, bool kStored = false, typename Call>
auto with_rank(int rank, Call call) {
  switch (rank) {
    case 16:
      if constexpr (!kSegmented && !kStored) return call(Config<kBlockN, 16, kEpilogue>{});
      [[fallthrough]];
    case 64: return call(Config<kBlockN, 64, kEpilogue, kSegmented, kStored>{});
    case 128: return call(Config<kBlockN, 128, kEpilogue, kSegmented, kStored>{});
  }
  if constexpr (kEpilogue == Epilogue::kPlain) return call(Config<256, 256, kEpilogue, kSegmented, kStored>{});
  return call(Config<kBlockN, 128, kEpilogue, kSegmented, kStored>{});
}

template <int kBlockN>
Tiling tiling_of(const Pass& pass, int clusters) {
  const auto tiling = [&](auto config) { return tiling_of<decltype(config)>(clusters); };
  const int rank = std::max(work::block_rank(pass.most_rank()), pass.segmented() || pass.dequantises() ? kBox : 0);
  if (!pass.gated) return with_rank<kBlockN, Epilogue::kPlain>(rank, tiling);
  return pass.backward ? with_rank<kBlockN, Epilogue::kGateGrad>(rank, tiling) : with_rank<kBlockN, Epilogue::kGate>(rank, tiling);
}

inline Tiling tiling_of(const Pass& pass, int clusters) {
  return wants_narrow_tiles(pass, clusters) ? tiling_of<128>(pass, clusters) : tiling_of<256>(pass, clusters);
}

}  // namespace fused_lora::sm90
