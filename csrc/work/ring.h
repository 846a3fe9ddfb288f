// Where weights in a format are dequantised: a ring of columns of tiles, as many as stay in the L2 cache, and never a whole weight but
// of a few columns. Pieces of it are dequantised in the order in which tiles read them, by whoever has time; a piece waits until all
// tiles have read what was in its place before, and a tile for its column's pieces. Both wait for earlier ones alone.
//
//   forward    rows of the ring are those of W, a tile's block_cols after another's; all parts have its columns
//   backward   columns of the ring are those of W, and each part has rows of its own, one part's behind another's
#pragma once

#include "pass.h"

namespace fused_lora::work {

constexpr int kPieceSize = 128;  // rows and columns of W in a piece

struct Ring {
  int tiles;     // columns of tiles that it holds; 0: no weight is in a format
  int across;    // pieces side by side in one of them
  int of_tile;   // pieces of one, `across` after another along its depth
  int pieces;    // of all
  int ready;     // the first flag of those of pieces
  int ready_stride;  // from those of a column to the next one's: of_tile, rounded up to four
  int done;      // the first of those of tiles that have read: two of each tile, by column and row
  int rows;      // of tiles
  int64_t bytes;
};

// From a row of the ring to the next, in elements.
inline int64_t ring_stride(const Pass& pass, const Ring& ring, int block_cols) {
  return pass.backward ? int64_t{ring.tiles} * block_cols : (pass.part[0].depth + 63) / 64 * 64;
}

}  // namespace fused_lora::work
