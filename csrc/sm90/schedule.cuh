// The list of work items of one pass, in the order in which clusters take them. An item waits only for earlier ones, so
// whoever is running can always finish.
//
// Rows come in groups whose tiles run together, so that weight and activations stay in L2. The list goes through the groups;
// before a group's tiles stand the shrink items of a later one, after most of them the gradient items of one near it: memory
// is asked evenly. Where groups are waves, tiles come first, then the next group's shrink items, then gradient items.
#pragma once

#include "../lora_linear.h"

namespace fused_lora::sm90 {

template <typename Int>
__host__ __device__ constexpr int ceil_div(Int a, int b) {
  return static_cast<int>((a + b - 1) / b);
}

constexpr int kBlockM = 128;  // rows of a block's tile; a cluster of two takes twice as many
constexpr int kPairRows = 2 * kBlockM;

enum class Work : short { kShrink, kTile, kGradientA, kGradientB, kEnd };

struct alignas(16) Item {
  Work work;
  short part;    // of the group: whose low, whose columns of out (backward they are one), whose gradient
  int row_pair;  // of a tile; the first of a shrink item or of a gradient's slice
  union {
    int col;    // of a tile, in tiles; of a gradient, in pairs of tiles
    int count;  // of a shrink item's row pairs, `stride` apart
  };
  union {
    int stride;
    int slice;  // of a gradient: of the rows, those from row_pair on
  };
};

struct Schedule {
  int row_pairs, groups, group_pairs, longer;  // the first `longer` groups have one pair more than group_pairs
  int slices;  // of the rows, a gradient item's: groups, or their halves
  int parts, tile_cols[kMostParts];  // of each part's out, backward and gated of the first's; 0 where it is not wanted
  int shrinking;                     // parts whose low is wanted
  short shrink_part[kMostParts];     // which those are
  bool rides;         // low comes from the first column of tiles instead of shrink items
  int shrink_batch;   // row pairs of a shrink item; 0 without them
  int shrink_lead;    // groups between shrink items and the tiles beside them
  int gradient_lead;  // the same of gradient items; negative where they come later than their tiles
  int tail;           // a step's gradient items come before this share of its tiles: the last 1 / tail, or none if 0
  bool waves;         // a step begins with its tiles
  int dA_pairs[kMostParts], dB_pairs[kMostParts];
  int finish_spacing;  // steps of a tile between boxes of the one before that leave for the finisher

  // Whether another tile waits for what one brings forth. A flag that nobody waits for must not be raised: the launch may be
  // over by then.
  __host__ __device__ bool riding_low_is_awaited() const { return tile_cols[0] > 1; }

  __host__ __device__ int first_pair(int group) const { return group * group_pairs + min(group, longer); }
  __host__ __device__ int pairs(int group) const {
    return group < 0 || group >= groups ? 0 : group_pairs + (group < longer ? 1 : 0);
  }
  __host__ __device__ int slice_first(int slice) const {
    if (slices == groups) return first_pair(slice);
    return first_pair(slice / 2) + slice % 2 * ceil_div(pairs(slice / 2), 2);
  }
  // One past the last row.
  __host__ __device__ int slice_end(int slice) const { return slice_first(slice + 1) * kPairRows; }
  __host__ __device__ int shrinks(int group) const {
    return shrink_batch == 0 ? 0 : ceil_div(pairs(group), shrink_batch) * shrinking;
  }
  __host__ __device__ int tiles(int group) const {
    int cols = 0;
    for (int part = 0; part < parts; ++part) cols += tile_cols[part];
    return pairs(group) * cols;
  }
  __host__ __device__ int gradient_cols() const {
    int cols = 0;
    for (int part = 0; part < parts; ++part) cols += dA_pairs[part] + dB_pairs[part];
    return cols;
  }
  __host__ __device__ int group_slices() const { return slices == groups ? 1 : 2; }
  __host__ __device__ int gradients(int group) const {
    return group < 0 || group >= groups ? 0 : group_slices() * gradient_cols();
  }

  __host__ __device__ int first_step() const { return -max(shrink_lead, gradient_lead); }
  __host__ __device__ int last_step() const { return groups + max(0, -gradient_lead); }
  __host__ __device__ int size(int step) const {
    return shrinks(step + shrink_lead) + tiles(step) + gradients(step + gradient_lead);
  }

  __host__ __device__ Item item(int step, int i) const {
    const int shrink_items = shrinks(step + shrink_lead), gradient_items = gradients(step + gradient_lead);
    if (waves && i < tiles(step)) return tile(step, i);
    if (waves) i -= tiles(step);
    if (i < shrink_items) return shrink(step + shrink_lead, i, shrink_items);
    i -= shrink_items;
    const int before = waves ? 0 : tiles(step) - (tail == 0 ? 0 : tiles(step) / tail);
    if (i < before) return tile(step, i);
    if (i < before + gradient_items) return gradient(step + gradient_lead, i - before);
    return tile(step, i - gradient_items);
  }

  // The group's row pairs dealt to its items in turn: the first of each come first. The same rows of all parts follow one
  // another.
  __host__ __device__ Item shrink(int group, int i, int items) const {
    const int first = i / shrinking, stride = items / shrinking;
    return {Work::kShrink, shrink_part[i % shrinking], first_pair(group) + first,
            {ceil_div(pairs(group) - first, stride)}, {stride}};
  }

  __host__ __device__ Item tile(int group, int i) const {
    int col = i / pairs(group);
    short part = 0;
    for (; col >= tile_cols[part]; ++part) col -= tile_cols[part];
    return {Work::kTile, part, first_pair(group) + i % pairs(group), {col}, {0}};
  }

  __host__ __device__ Item gradient(int group, int i) const {
    int col = i % gradient_cols();
    short part = 0;
    for (; col >= dA_pairs[part] + dB_pairs[part]; ++part) col -= dA_pairs[part] + dB_pairs[part];
    const int slice = group * group_slices() + i / gradient_cols(), first = slice_first(slice);
    if (col < dB_pairs[part]) return {Work::kGradientB, part, first, {col}, {slice}};
    return {Work::kGradientA, part, first, {col - dB_pairs[part]}, {slice}};
  }
};

// Where in the list its reader is; it is asked for growing indices.
struct Cursor {
  int step, begin;

  __host__ __device__ explicit Cursor(const Schedule& schedule) : step(schedule.first_step()), begin(0) {}

  __host__ __device__ Item item(const Schedule& schedule, int index) {
    for (; step < schedule.last_step(); ++step) {
      const int size = schedule.size(step);
      if (index < begin + size) return schedule.item(step, index - begin);
      begin += size;
    }
    return {Work::kEnd, 0, 0, {0}, {0}};
  }
};

}  // namespace fused_lora::sm90
