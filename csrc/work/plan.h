// The list of work items of one pass, in the order in which workers take them. Host code; nothing here touches a device.
#pragma once

#include <vector>

#include "item.h"
#include "pass.h"
#include "ring.h"

namespace fused_lora::work {

// Ranks are padded to the next of these in the tensor cores; memory holds none of the padding.
constexpr int block_rank(int64_t r) { return r <= 16 ? 16 : r <= 64 ? 64 : r <= 128 ? 128 : 256; }

// How a kernel cuts a pass, and who works.
struct Tiling {
  int rows;           // of an item
  int block_cols;     // of a tile's products
  int tile_cols;      // of out: half of them where a tile is of gate and up
  int rank;           // to which ranks are padded
  int item_ranks;     // of a shrink or gradient item: all of them where shrink items have strides
  bool strides;       // whether a shrink item may make several items' rows
  bool cuts_shrinks;  // whether shrink items may be cut in two where there is more than one wave of tiles
  int gradient_cols;  // of an item
  int flag_rows;      // of low, for which there is one flag
  int chain_flags;    // of a gradient item's columns, which as many writers share
  bool can_ride;
  int workers;
  int stages;  // of an architecture with several kernels for them
};

struct Plan {
  Tiling tiling;
  std::vector<Item> items;
  int low_flags;       // of each part: for each rows of an item, and of those for each of its items
  int chain_flags;     // of all gradients, a slice
  int flags;           // in all
  int64_t partials;    // floats for sums of gradients that are under way
  Ring ring;
  int finish_spacing;  // steps of a tile between boxes of the one before that leave for the finisher
  int first_shrinks;   // items that the first tiles wait for
  int halves;          // items that were cut in two (halves.h)
  int half_flags;      // the first one of theirs
  int64_t half_floats;  // for their sums, behind the gradients'

  int64_t floats() const { return partials + half_floats; }
};

Plan make_plan(const Pass& pass, const Tiling& tiling);

// Of a gradient of `cols` columns: those of its items, and the floats that its sums take.
inline int64_t partial_cols(const Tiling& tiling, int64_t cols) {
  return int64_t{tiling.gradient_cols} * ceil_div(cols, tiling.gradient_cols);
}
inline int64_t partial_floats(const Tiling& tiling, const Pass& pass, int64_t cols) {
  return pass.sums() * partial_cols(tiling, cols) * tiling.rank;
}

}  // namespace fused_lora::work
