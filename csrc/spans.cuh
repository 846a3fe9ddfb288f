// What the tables of segments (work/segments.h) say of a block of rows, and of a slice of tokens of a gradient.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lora_linear.h"
#include "work/item.h"

namespace fused_lora {

constexpr int kLowBox = 64, kBoxSlices = kLowBox / work::kSlice;  // ranks of a box of low, and slices of them

__device__ __forceinline__ int ceil_of(int a, int b) { return (a + b - 1) / b; }

// Of a block of rows, on a level.
struct Span {
  const work::Segments& segments;
  const int window;  // its ranks
  const work::Block block;

  __device__ Span(const work::Segments& of, int window, int level, int row)
      : segments(of), window(window), block(load(of.blocks + level * of.blocks_count + row / kSegmentRows)) {}

  __device__ bool is_empty() const { return block.first == block.last; }

  // Boxes of 64 ranks that have its adapters, counted from its first window's on.
  __device__ int first_box() const { return block.first / kBoxSlices; }
  __device__ int end_box() const { return ceil_of(block.last, kBoxSlices); }
  __device__ int boxes() const { return is_empty() ? 0 : end_box() - first_box(); }
  // Slices of a box that its adapters have.
  __device__ int first_slice(int box) const { return max(0, block.first - box * kBoxSlices); }
  __device__ int end_slice(int box) const { return min(kBoxSlices, block.last - box * kBoxSlices); }
  // The first row of low's that a box has, and its first rank in the slabs.
  __device__ int low_row(int box) const { return (block.low + box) * kSegmentRows; }
  __device__ int rank_of_box(int box) const { return rank(block.window + box / of_window()) + box % of_window() * kLowBox; }

  // The windows that have its adapters, among the pass's.
  __device__ int first_window() const { return block.window + first_box() / of_window(); }
  __device__ int end_window() const { return is_empty() ? first_window() : block.window + ceil_of(end_box(), of_window()); }
  __device__ int rank(int of) const { return __ldg(&segments.windows[of].rank); }
  __device__ int low_row_of(int of) const { return low_row((of - block.window) * of_window()); }

 private:
  __device__ int of_window() const { return window / kLowBox; }  // boxes

  static __device__ work::Block load(const work::Block* from) {
    const int4 words = __ldg(reinterpret_cast<const int4*>(from));
    return {words.x, words.y, words.z, words.w};
  }
};

// Those of a level whose gradients a gradient item adds to, one after another: all that have rows in its slice, and those without
// rows that would have them there.
struct Windows {
  const work::Segments& segments;
  const int begin, end;  // of the slice
  const bool last;       // slice
  const int level;
  int index;  // among all levels'
  int4 own;

  __device__ Windows(const work::Segments& of, int window, int of_level, const work::Item& item, int M)
      : segments(of), begin(item.row), end(min(M, item.row + item.rows)), last(item.bits & work::kLast), level(of_level),
        index(Span(of, window, of_level, item.row).block.window) {
    load();
  }

  __device__ int rank() const { return own.x; }
  __device__ bool exist() const { return index < segments.windows_count && own.w == level && (own.y < end || last); }
  __device__ void advance() { advance_to(index + 1); }
  __device__ void advance_to(int to) {
    index = to;
    load();
  }

  // Its rows in this slice.
  __device__ bool has_rows() const { return own.y < own.z; }
  __device__ int first_row() const { return max(own.y, begin); }
  __device__ int end_row() const { return min(own.z, end); }

  // Whether its sums begin here, and are whole here: the bits that an item has otherwise.
  __device__ int bits() const { return (own.y >= begin ? work::kFirst : 0) | (own.z <= end || last ? work::kLast : 0); }

 private:
  __device__ void load() {
    if (index < segments.windows_count) own = __ldg(reinterpret_cast<const int4*>(segments.windows + index));
  }
};

// By which a row's adapter on a level drops.
__device__ __forceinline__ uint32_t threshold_of(const work::Segments& segments, int level, int row) {
  return __ldg(segments.thresholds + level * segments.blocks_count * kSegmentRows + row);
}

// A row's adapter on a level.
struct RowRanks {
  int first, count;  // slices, counted from the pass's first window on
  float scale;

  // By the scale that `of` makes of the adapter's.
  template <typename Of>
  __device__ RowRanks(const work::Segments& segments, const float* scales, int level, int row, Of of) {
    const work::Row* rows = segments.rows + level * segments.blocks_count * kSegmentRows + row;
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(rows));
    first = words.x & 0xFFFFFF;
    count = words.x >> 24;
    scale = of(__ldg(scales + words.y));
  }

  // What is chosen, since what is not may be no number.
  __device__ __forceinline__ float choose(float value, int slice) const {
    return static_cast<unsigned>(slice - first) < static_cast<unsigned>(count) ? value * scale : 0;
  }
};

}  // namespace fused_lora
