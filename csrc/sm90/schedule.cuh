// The list of work items of one pass, in the order in which clusters take them. An item waits only for earlier ones, so
// whoever is running can always finish.
//
//   forward    shrink items, then the tiles of y
//   backward   shrink items, then for each group of rows: its tiles of dx, then its share of the sums of dB and dA
#pragma once

namespace fused_lora::sm90 {

constexpr int kBlockM = 128;           // rows of a block's tile; a cluster of two takes twice as many
constexpr int kPairRows = 2 * kBlockM;
constexpr int kGroupPairs = 8;         // row pairs whose tiles run together, so that weight and activations stay in L2

enum class Work { kShrink, kTile, kGradient, kEnd };

struct Item {
  Work work;
  int row_pair;  // shrink (the first of them), tile
  int col;       // tile, gradient: in units of tiles; of pairs of tiles for a gradient
  int group;     // gradient
  bool of_A;     // gradient: dA, else dB
};

struct Schedule {
  int row_pairs;
  int groups;
  int shrink_items;  // each takes every shrink_items-th row pair
  int tile_cols;     // 0 where no output is wanted
  int dA_pairs, dB_pairs;
  int total;

  __host__ __device__ int per_group() const { return kGroupPairs * tile_cols + dA_pairs + dB_pairs; }

  __device__ Item item(int index) const {
    if (index >= total) return {Work::kEnd, 0, 0, 0, false};
    if (index < shrink_items) return {Work::kShrink, index, 0, 0, false};
    index -= shrink_items;
    const int group = index / per_group(), within = index - group * per_group();
    const int first = group * kGroupPairs, rows = min(kGroupPairs, row_pairs - first);
    if (within < rows * tile_cols) return {Work::kTile, first + within % rows, within / rows, group, false};
    const int gradient = within - rows * tile_cols;
    const bool of_A = gradient >= dB_pairs;
    return {Work::kGradient, 0, of_A ? gradient - dB_pairs : gradient, group, of_A};
  }
};

inline Schedule make_schedule(int M, int tile_cols, int shrink_batch, int dA_pairs, int dB_pairs) {
  Schedule s{};
  s.row_pairs = (M + kPairRows - 1) / kPairRows;
  s.groups = (s.row_pairs + kGroupPairs - 1) / kGroupPairs;
  s.shrink_items = (s.row_pairs + shrink_batch - 1) / shrink_batch;
  s.tile_cols = tile_cols;
  s.dA_pairs = dA_pairs;
  s.dB_pairs = dB_pairs;
  s.total = s.shrink_items + s.row_pairs * tile_cols + s.groups * (dA_pairs + dB_pairs);
  return s;
}

}  // namespace fused_lora::sm90
