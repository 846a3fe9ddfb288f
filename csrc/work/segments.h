// Rows that choose their adapter. The adapters of a linear lie side by side in slabs A (R, K) and B^T (R, N), each at a place of
// 16, 32, 64, 128 or 256 ranks that begins at a multiple of its size; what its own r does not fill is zero. A window is as many ranks
// as a kernel multiplies at once, so that an adapter lies in one. A row may have several adapters, one on each level. A level has a
// list of windows, in the order of rows: the rows of one follow one another, and no others are among them.
//
// low has the ranks of all adapters that a block of rows meets, zeros where a row has another one: level after level, of each block
// after block, of each window after window, as boxes of 64 ranks and all rows of the block. So tiles and gradients need to know
// nothing of rows.
//
// The tables (fused_lora/segments) are on the device, and the lists of work do not depend on them: one launch computes any division
// of its rows.
#pragma once

#include <cstdint>

namespace fused_lora::work {

constexpr int kSlice = 16;  // ranks, in which places are counted

// Level after level.
struct alignas(16) Window {
  int rank;        // where it begins in the slabs
  int begin, end;  // its rows; none where they are the same
  int level;
};

struct alignas(16) Block {
  int window;       // the first whose rows end in or behind the block, or that has none and would begin there
  int low;          // the box of low with which that one begins
  int first, last;  // the slices of its rows' adapters, counted from that window's on; the same where there are none
};

struct alignas(8) Row {
  uint32_t slices;  // the first one, counted from the first window's on, and behind 24 bits how many
  int place;        // the slice of the slabs with which its adapter's begin, of which the scales are
};

// Of one linear of a pass: all levels' tables, one behind another.
struct Segments {
  const Block* blocks;
  const Window* windows;
  const Row* rows;  // of all blocks, also behind the last row
  int windows_count;
  int levels;
  int blocks_count;  // of a level
  int ranks;         // of the slabs, a multiple of 64: they may end within a window
  const uint32_t* thresholds;  // of rows, as rows is: which entries of x are dropped (mask.cuh), level after level by another seed; or null
};

}  // namespace fused_lora::work
