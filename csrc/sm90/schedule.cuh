// The list of work items of one pass, in the order in which clusters take them. An item waits only for earlier ones, so
// whoever is running can always finish.
//
// Rows come in groups whose tiles run together, so that weight and activations stay in L2. The list goes through the groups;
// beside a group's tiles stand the shrink items of a later one and, before its last quarter, the gradient items of one near it:
// memory is asked evenly, and the last items are tiles and small.
#pragma once

namespace fused_lora::sm90 {

constexpr int kBlockM = 128;  // rows of a block's tile; a cluster of two takes twice as many
constexpr int kPairRows = 2 * kBlockM;
constexpr int kGroupPairs = 8;
constexpr int kGroupRows = kGroupPairs * kPairRows;

enum class Work : int { kShrink, kTile, kGradientA, kGradientB, kEnd };

struct alignas(16) Item {
  Work work;
  int row_pair;  // of a tile; the first of a shrink item
  int col;       // in tiles; in pairs of tiles for a gradient
  int group;     // of a gradient; the stride between the row pairs of a shrink item
};

struct Schedule {
  int row_pairs, groups;
  int tile_cols;       // of out; 0 where it is not wanted
  bool rides;          // low comes from the first column of tiles instead of shrink items
  int shrink_batch;    // row pairs of a shrink item; 0 without them
  int shrink_lead;     // groups between shrink items and the tiles beside them
  int gradient_lead;   // the same of gradient items; negative where they come later than their tiles
  int dA_pairs, dB_pairs;

  // Whether some item waits for low's flags. Flags that nobody waits for must not be raised: the launch may be over by then.
  __host__ __device__ bool low_is_awaited() const { return !rides || tile_cols > 1 || dA_pairs > 0; }

  __host__ __device__ int pairs(int group) const {
    return group < 0 || group >= groups ? 0 : min(kGroupPairs, row_pairs - group * kGroupPairs);
  }
  __host__ __device__ int shrinks(int group) const {
    return shrink_batch == 0 ? 0 : (pairs(group) + shrink_batch - 1) / shrink_batch;
  }
  __host__ __device__ int tiles(int group) const { return pairs(group) * tile_cols; }
  __host__ __device__ int gradients(int group) const { return pairs(group) > 0 ? dA_pairs + dB_pairs : 0; }
  __host__ __device__ int size(int step) const {
    return shrinks(step + shrink_lead) + tiles(step) + gradients(step + gradient_lead);
  }
  __host__ __device__ int first_step() const { return -max(shrink_lead, gradient_lead); }
  __host__ __device__ int last_step() const { return groups + max(0, -gradient_lead); }

  __device__ Item item(int step, int i) const {
    const int shrink_items = shrinks(step + shrink_lead);
    if (i < shrink_items) return {Work::kShrink, (step + shrink_lead) * kGroupPairs + i, 0, shrink_items};
    i -= shrink_items;
    const int before = tiles(step) - tiles(step) / 4, gradient = i - before;
    if (gradient < 0) return tile(step, i);
    if (gradient >= gradients(step + gradient_lead)) return tile(step, i - gradients(step + gradient_lead));
    if (gradient < dB_pairs) return {Work::kGradientB, 0, gradient, step + gradient_lead};
    return {Work::kGradientA, 0, gradient - dB_pairs, step + gradient_lead};
  }

  __device__ Item tile(int group, int i) const {
    return {Work::kTile, group * kGroupPairs + i % pairs(group), i / pairs(group), group};
  }
};

// Where in the list its reader is; it is asked for growing indices.
struct Cursor {
  int step, begin;

  __device__ explicit Cursor(const Schedule& schedule) : step(schedule.first_step()), begin(0) {}

  __device__ Item item(const Schedule& schedule, int index) {
    for (; step < schedule.last_step(); ++step) {
      const int size = schedule.size(step);
      if (index < begin + size) return schedule.item(step, index - begin);
      begin += size;
    }
    return {Work::kEnd, 0, 0, 0};
  }
};

}  // namespace fused_lora::sm90
