// What a pass needs and in which order it works, from its sizes alone. Host code; nothing here touches a device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pipeline.cuh"
#include "schedule.cuh"

namespace fused_lora::sm90 {

// What one linear of a group adds to a pass: out (M, cols) sums over depth. Backward the summed ones have the same cols, and one
// out.
struct PassPart {
  int64_t cols, depth, r;       // r = 0: it has no factors
  bool wants_dA, wants_dB;      // backward; sums of dy come with dB
};

struct Pass {
  int64_t M;
  bool backward, drops, wants_out, gated;
  int parts, summed;  // summed: those that tiles are made of, which come first
  PassPart part[kMostParts];

  bool needs_low(int i) const { return i < summed && part[i].r > 0 && (wants_out || part[i].wants_dA); }
  int64_t most_rank() const {
    int64_t r = 0;
    for (int i = 0; i < parts; ++i) r = std::max(r, part[i].r);
    return r;
  }
  // Of one tile's products.
  int64_t depth() const {
    int64_t sum = part[0].depth;
    for (int i = 1; backward && i < summed; ++i) sum += part[i].depth;
    return sum;
  }
  int tile_cols(int block) const {
    int sum = ceil_div(part[0].cols, block);
    for (int i = 1; !backward && i < parts; ++i) sum += ceil_div(part[i].cols, block);
    return sum;
  }
};

// Ranks are padded to the next of these in the tensor cores; memory holds none of the padding.
constexpr int block_rank(int64_t r) { return r <= 16 ? 16 : r <= 64 ? 64 : r <= 128 ? 128 : 256; }

// Tiles of 128 columns take 0.56 of the time of those of 256 and fill a wave where there are few.
inline bool wants_narrow_tiles(const Pass& pass, int clusters) {
  const int64_t row_pairs = ceil_div(pass.M, kPairRows);
  const int wide_waves = ceil_div(row_pairs * pass.tile_cols(256), clusters);
  const int narrow_waves = ceil_div(row_pairs * pass.tile_cols(128), clusters);
  return !pass.gated && pass.most_rank() <= 128 && 0.56 * narrow_waves < wide_waves;
}

// How the list is cut; the counts follow from it.
struct Cut {
  int groups;
  bool halves_slices;
  int shrink_batch;  // row pairs of a shrink item; 0 without them
  int tail;          // a step's gradient items come before this share of its tiles: the last 1 / tail, or none if 0
};

// Groups such that each one's tiles and what goes with them take all clusters the time of one tile: tiles that run together ask
// for the same bytes at the same time, and what is short fills the clusters that have none.
inline void make_waves(Schedule& s, Cut& cut, const Pass& pass, int tile_cols, int clusters) {
  const double steps = static_cast<double>(pass.depth()) / kBox;  // of a tile; those of the others take so much of their time:
  const double shrink = 0.6 * steps, gradient = 0.95 * kPairRows / kBox * s.gradient_cols;
  const double waves = s.row_pairs * (tile_cols * steps + shrink + gradient) / (clusters * steps);
  s.waves = true;
  cut.groups = std::max({1, static_cast<int>(waves + 0.5), ceil_div(s.row_pairs * tile_cols, clusters)});
  cut.groups = std::min(cut.groups, s.row_pairs);
  cut.shrink_batch = std::min(cut.shrink_batch, 1);
  s.shrink_lead = 1;
  s.gradient_lead = 0;
}

inline Counts counts_of(const Schedule& s, const Cut& cut, int pairs, int tile_cols) {
  Counts counts{pairs};
  counts.tiles = pairs * tile_cols;
  counts.first_tiles = s.waves ? 0 : counts.tiles - (cut.tail == 0 ? 0 : counts.tiles / cut.tail);
  counts.gradients = (cut.halves_slices ? 2 : 1) * s.gradient_cols;
  if (cut.shrink_batch > 0) {
    counts.shrink_stride = ceil_div(pairs, cut.shrink_batch);
    counts.shrinks = counts.shrink_stride * s.shrinking;
  }
  return counts;
}

// The list's order was chosen by measurement (docs/hopper.md). A shrink item costs about half a tile: where tiles are long, two
// at a time keep the clusters in step. Short tiles want shrink and gradient items several groups ahead, since those take longer
// than a group.
template <typename C>
Schedule make_schedule(const Pass& pass, int clusters) {
  Schedule s{};
  Cut cut{};
  s.row_pairs = ceil_div(pass.M, kPairRows);
  int tile_cols = 0;
  for (int i = 0; pass.wants_out && i < (pass.backward || pass.gated ? 1 : pass.parts); ++i) {
    tile_cols += s.tile_cols[i] = ceil_div(pass.part[i].cols, C::kTileCols);
  }
  const bool long_tiles = pass.depth() >= 3072, masks_shrink = pass.drops && !pass.backward;  // which makes its items long
  // Riding delays the other tiles of the first wave; that is worth it where lhs is read by few columns of tiles.
  s.rides = C::kCanRide && !pass.backward && !pass.drops && pass.parts == 1 && pass.part[0].r > 0 && tile_cols <= 4;
  const int most_pairs = s.rides ? 32 : 8;  // of a group
  cut.groups = ceil_div(s.row_pairs, most_pairs);
  const bool small_groups = most_pairs * tile_cols < clusters / 2;
  for (int i = 0; i < pass.parts; ++i) {
    if (pass.needs_low(i)) s.shrink_part[s.shrinking++] = static_cast<short>(i);
  }
  if (s.shrinking > 0 && !s.rides) {
    cut.shrink_batch = long_tiles && C::kBlockN == 256 && C::kBlockR <= 128 && !masks_shrink ? 2 : 1;
    s.shrink_lead = pass.backward && small_groups ? 4 : 1;
  }
  s.gradient_lead = pass.backward && small_groups ? std::min(2, std::max(0, s.shrink_lead - 1)) : 0;
  cut.tail = long_tiles ? 0 : 4;
  s.finish_spacing = std::max<int>(1, pass.depth() / C::kTileCols);
  for (int i = 0; i < pass.parts; ++i) {
    if (pass.part[i].wants_dA) s.dA_pairs[i] = ceil_div(pass.part[i].cols, kCluster * C::kGradientCols);
    if (pass.part[i].wants_dB) s.dB_pairs[i] = ceil_div(pass.part[i].depth, kCluster * C::kGradientCols);
    s.gradient_cols += s.dA_pairs[i] + s.dB_pairs[i];
  }
  // Few rows leave few items, whose chain should be short; masked items take twice as long, and come last where tiles are short.
  cut.halves_slices = cut.groups == 1 || (pass.drops && pass.depth() >= 2048);
  const bool few_cols = tile_cols > 0 && 5 * tile_cols <= clusters;
  if (pass.backward && long_tiles && few_cols && !pass.gated) make_waves(s, cut, pass, tile_cols, clusters);
  const int pairs = s.row_pairs / cut.groups;
  cut.halves_slices = cut.halves_slices && pairs > 4;
  s.groups = cut.groups;
  s.longer = s.row_pairs % cut.groups;
  s.slices = s.groups * (cut.halves_slices ? 2 : 1);
  for (int more = 0; more < 2; ++more) s.counts[more] = counts_of(s, cut, pairs + more, tile_cols);
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
