// What a pass needs and in which order it works, from its sizes alone. Host code; nothing here touches a device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pipeline.cuh"
#include "schedule.cuh"

namespace fused_lora::sm90 {

// The sizes of one pass: out (M, N) sums over K.
struct Pass {
  int64_t M, N, K, r;
  bool backward, drops;
  bool wants_out, wants_dA, wants_dB;  // forward: the first; sums of dy come with dB

  bool needs_low() const { return wants_out || wants_dA; }
};

// Ranks are padded to the next of these in the tensor cores; memory holds none of the padding.
constexpr int block_rank(int64_t r) { return r <= 16 ? 16 : r <= 64 ? 64 : r <= 128 ? 128 : 256; }

// Tiles of 128 columns take 0.56 of the time of those of 256 and fill a wave where there are few.
inline bool wants_narrow_tiles(int64_t M, int64_t N, int64_t r, int clusters) {
  const int64_t row_pairs = ceil_div(M, kPairRows);
  const int wide_waves = ceil_div(row_pairs * ceil_div(N, 256), clusters);
  const int narrow_waves = ceil_div(row_pairs * ceil_div(N, 128), clusters);
  return r <= 128 && 0.56 * narrow_waves < wide_waves;
}

// The list's order was chosen by measurement (docs/hopper.md). A shrink item costs about half a tile: where tiles are long, two
// at a time keep the clusters in step. Short tiles want shrink and gradient items several groups ahead, since those take longer
// than a group.
template <typename C>
Schedule make_schedule(const Pass& pass, int clusters) {
  Schedule s{};
  s.row_pairs = ceil_div(pass.M, kPairRows);
  s.tile_cols = pass.wants_out ? ceil_div(pass.N, C::kBlockN) : 0;
  const bool long_tiles = pass.K >= 3072, masks_shrink = pass.drops && !pass.backward;  // which makes its items long
  // Riding delays the other tiles of the first wave; that is worth it where lhs is read by few columns of tiles.
  s.rides = C::kCanRide && !pass.backward && !pass.drops && s.tile_cols <= 4;
  s.group_pairs = s.rides ? 32 : 8;
  s.groups = ceil_div(s.row_pairs, s.group_pairs);
  const bool small_groups = s.group_pairs * s.tile_cols < clusters / 2;
  if (pass.needs_low() && !s.rides) {
    s.shrink_batch = long_tiles && C::kBlockN == 256 && C::kBlockR <= 128 && !masks_shrink ? 2 : 1;
    s.shrink_lead = pass.backward && small_groups ? 4 : 1;
  }
  s.gradient_lead = pass.backward && small_groups ? std::min(2, std::max(0, s.shrink_lead - 1)) : 0;
  s.tail = long_tiles ? 0 : 4;
  // Few rows leave few items, whose chain should be short; masked items take twice as long, and come last where tiles are short.
  const bool halves_slices = s.groups == 1 || (pass.drops && pass.K >= 2048);
  s.slice_pairs = halves_slices ? 4 : s.group_pairs;
  if (pass.wants_dA) s.dA_pairs = ceil_div(pass.N, kCluster * C::kGradientCols);
  if (pass.wants_dB) s.dB_pairs = ceil_div(pass.K, kCluster * C::kGradientCols);
  return s;
}

// Flags of low: two warpgroups for each 128 rows write it, into one flag.
inline int64_t ready_flags(int64_t M) { return kPairRows / kBlockM * ceil_div(M, kPairRows); }

// Of a gradient with `cols` columns: flags of its chained sums, one for each warpgroup's part; their fp32 values, and those of
// the columns' own sums.
template <typename C>
int64_t chain_flags(int64_t cols) {
  return kCluster * kConsumers * ceil_div(cols, kCluster * C::kGradientCols);
}
template <typename C>
int64_t partial_cols(int64_t cols) {
  return int64_t{kCluster} * C::kGradientCols * ceil_div(cols, kCluster * C::kGradientCols);
}
template <typename C>
int64_t partial_floats(int64_t cols) {
  return partial_cols<C>(cols) * C::kBlockR;
}

// Enough of them for whichever tile is chosen.
inline int64_t most_chain_flags(int64_t cols) { return chain_flags<Config<128, 16>>(cols); }
inline int64_t most_partial_cols(int64_t cols) { return partial_cols<Config<256, 16>>(cols); }
inline int64_t most_partial_floats(int64_t cols, int64_t r) { return most_partial_cols(cols) * block_rank(r); }

}  // namespace fused_lora::sm90
