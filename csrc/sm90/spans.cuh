// What the tables of segments say of a block of rows, and of the slice of tokens of a gradient item.
#pragma once

#include "params.cuh"
#include "pipeline.cuh"

namespace fused_lora::sm90 {

// Of the item's rows that begin at `row`, on a level.
template <typename C>
struct Span {
  static constexpr int kBoxes = boxes_of(C::kBlockR), kBoxSlices = kBox / work::kSlice;  // of a window; of a box

  const work::Segments& segments;
  const work::Block block;

  __device__ Span(const work::Segments& of, int level, int row)
      : segments(of), block(load(of.blocks + level * of.blocks_count + row / kPairRows)) {}

  __device__ bool is_empty() const { return block.first == block.last; }

  // Boxes of 64 ranks that have its adapters, counted from its first window's on.
  __device__ int first_box() const { return block.first / kBoxSlices; }
  __device__ int end_box() const { return ceil_div(block.last, kBoxSlices); }
  __device__ int boxes() const { return is_empty() ? 0 : end_box() - first_box(); }
  // Slices of a box that its adapters have.
  __device__ int first_slice(int box) const { return max(0, block.first - box * kBoxSlices); }
  __device__ int end_slice(int box) const { return min(kBoxSlices, block.last - box * kBoxSlices); }
  // The first row of low's that a box has, and its first rank in the slabs.
  __device__ int low_row(int box) const { return (block.low + box) * kPairRows; }
  __device__ int rank_of_box(int box) const { return rank(block.window + box / kBoxes) + box % kBoxes * kBox; }

  // The windows that have its adapters, among the pass's.
  __device__ int first_window() const { return block.window + first_box() / kBoxes; }
  __device__ int end_window() const { return is_empty() ? first_window() : block.window + ceil_div(end_box(), kBoxes); }
  __device__ int rank(int window) const { return __ldg(&segments.windows[window].rank); }
  __device__ int low_row_of(int window) const { return low_row((window - block.window) * kBoxes); }

 private:
  static __device__ work::Block load(const work::Block* from) {
    const int4 words = __ldg(reinterpret_cast<const int4*>(from));
    return {words.x, words.y, words.z, words.w};
  }
};

// Those of a level whose gradients a gradient item adds to, one after another: all that have rows in its slice, and those without
// rows that would have them there.
template <typename C>
struct Windows {
  const work::Segments& segments;
  const int begin, end;  // of the slice
  const bool last;       // slice
  const int level;
  int index;  // among all levels'
  int4 own;

  __device__ Windows(const work::Segments& of, int of_level, const Item& item, int M)
      : segments(of), begin(item.row), end(min(M, item.row + item.rows)), last(item.bits & work::kLast), level(of_level),
        index(Span<C>(of, of_level, item.row).block.window) {
    load();
  }

  __device__ int rank() const { return own.x; }
  __device__ bool exist() const { return index < segments.windows_count && own.w == level && (own.y < end || last); }
  __device__ void advance() {
    ++index;
    load();
  }

  // Its rows in this slice, in whole steps.
  __device__ int first_row() const { return max(own.y, begin) / kBox * kBox; }
  __device__ int end_row() const { return min(own.z, end); }
  __device__ int steps() const { return own.y < own.z ? ceil_div(end_row() - first_row(), kBox) : 0; }

  // Of a step's rows, those that are its.
  __device__ int first_own(int step) const { return own.y - first_row() - step * kBox; }
  __device__ int end_own(int step) const { return end_row() - first_row() - step * kBox; }

  // Whether its sums begin here, and are whole here: the bits that an item has otherwise.
  __device__ int bits() const { return (own.y >= begin ? work::kFirst : 0) | (own.z <= end ? work::kLast : 0); }

 private:
  __device__ void load() {
    if (index < segments.windows_count) own = __ldg(reinterpret_cast<const int4*>(segments.windows + index));
  }
};

}  // namespace fused_lora::sm90
