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

// Of one group: its row pairs, how far the row pairs of a shrink item are apart, and its items; of tiles also how many come
// before the gradient items of a step.
struct Counts {
  int pairs, shrink_stride, shrinks, tiles, first_tiles, gradients;
};

// Every item waits for its number to be understood, so the counts stand ready and nothing is divided that need not be.
struct Schedule {
  int row_pairs, groups, longer;
  Counts counts[2];  // of a group, and of the first `longer` ones, which have one row pair more
  int slices;        // of the rows, a gradient item's: groups, or their halves
  int tile_cols[kMostParts];         // of each part's out, backward and gated of the first's; 0 where it is not wanted
  int shrinking;                     // parts whose low is wanted
  short shrink_part[kMostParts];     // which those are
  bool rides;         // low comes from the first column of tiles instead of shrink items
  int shrink_lead;    // groups between shrink items and the tiles beside them
  int gradient_lead;  // the same of gradient items; negative where they come later than their tiles
  bool waves;         // a step begins with its tiles
  int dA_pairs[kMostParts], dB_pairs[kMostParts], gradient_cols;  // the last is their sum
  int finish_spacing;  // steps of a tile between boxes of the one before that leave for the finisher

  // Whether another tile waits for what one brings forth. A flag that nobody waits for must not be raised: the launch may be
  // over by then.
  __host__ __device__ bool riding_low_is_awaited() const { return tile_cols[0] > 1; }

  __host__ __device__ int first_pair(int group) const { return group * counts[0].pairs + min(group, longer); }
  __host__ __device__ Counts of(int group) const {
    return group < 0 || group >= groups ? Counts{} : counts[group < longer];
  }
  __host__ __device__ int slice_first(int slice) const {
    if (slices == groups) return first_pair(slice);
    return first_pair(slice / 2) + slice % 2 * ceil_div(of(slice / 2).pairs, 2);
  }
  // One past the last row.
  __host__ __device__ int slice_end(int slice) const { return slice_first(slice + 1) * kPairRows; }

  __host__ __device__ int first_step() const { return -max(shrink_lead, gradient_lead); }
  __host__ __device__ int last_step() const { return groups + max(0, -gradient_lead); }
  __host__ __device__ int size(int step) const {
    return of(step + shrink_lead).shrinks + of(step).tiles + of(step + gradient_lead).gradients;
  }

  __host__ __device__ Item item(int step, int i) const {
    const Counts own = of(step);
    const int shrinks = of(step + shrink_lead).shrinks, gradients = of(step + gradient_lead).gradients;
    if (waves && i < own.tiles) return tile(step, i);
    if (waves) i -= own.tiles;
    if (i < shrinks) return shrink(step + shrink_lead, i);
    i -= shrinks;
    if (i < own.first_tiles) return tile(step, i);
    if (i < own.first_tiles + gradients) return gradient(step + gradient_lead, i - own.first_tiles);
    return tile(step, i - gradients);
  }

  // The group's row pairs dealt to its items in turn: the first of each come first. The same rows of all parts follow one
  // another.
  __host__ __device__ Item shrink(int group, int i) const {
    const Counts own = of(group);
    const int first = shrinking == 1 ? i : i / shrinking;
    int count = 1;
    while (first + count * own.shrink_stride < own.pairs) ++count;
    return {Work::kShrink, shrink_part[i - first * shrinking], first_pair(group) + first, {count}, {own.shrink_stride}};
  }

  __host__ __device__ Item tile(int group, int i) const {
    const int pairs = of(group).pairs, first_col = i / pairs;
    int col = first_col;
    short part = 0;
    for (; col >= tile_cols[part]; ++part) col -= tile_cols[part];
    return {Work::kTile, part, first_pair(group) + i - first_col * pairs, {col}, {0}};
  }

  __host__ __device__ Item gradient(int group, int i) const {
    const bool second = i >= gradient_cols;  // half of the group
    int col = i - (second ? gradient_cols : 0);
    short part = 0;
    for (; col >= dA_pairs[part] + dB_pairs[part]; ++part) col -= dA_pairs[part] + dB_pairs[part];
    const int slice = slices == groups ? group : 2 * group + second, first = slice_first(slice);
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
