// A linear of few rows, and where a row finds its adapter. few_rows.cu tells the story.
#pragma once

#include "../dtype.h"
#include "../elements.cuh"
#include "../spans.cuh"
#include "fragments.cuh"
#include "pipeline.cuh"

namespace fused_lora::sm90 {

constexpr int kFewRows = 64;  // at most
constexpr int kChunk = 8;     // elements, which are 16 bytes

// One linear.
struct FewRows {
  CUtensorMap x_map, weight_map;
  const uint16_t *x, *down, *up;  // up is B (N, r), with segments the slab of B^T
  uint16_t *low, *y;
  int64_t x_stride, down_stride, up_stride, low_stride;
  int M, N, K, r;  // r: the part's, or a window's
  const float *scale, *gain;
  const void* bias;
  DType bias_dtype;
  work::Segments segments;

  __host__ __device__ bool segmented() const { return segments.levels > 0; }
  __host__ __device__ int levels() const { return segmented() ? segments.levels : 1; }
};

__device__ __forceinline__ uint4 load_chunk(const uint16_t* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }

// A row's adapter on a level: where it begins in the slabs, its ranks, its scale, and where its low lies.
struct Adapter {
  int rank, ranks, slice;  // slice: the first one of its low, counted from the block's first window on
  float scale;
  work::Block block;

  Adapter() = default;
  __device__ Adapter(const FewRows& p, int level, int row) : rank(0), ranks(p.r), slice(0), scale(0), block{} {
    int place = 0;
    if (p.segmented()) {
      const uint2 own = __ldg(reinterpret_cast<const uint2*>(p.segments.rows + level * p.segments.blocks_count * kPairRows + row));
      block = fused_lora::Span(p.segments, p.r, level, 0).block;  // the first one has all rows
      place = static_cast<int>(own.y);
      ranks = static_cast<int>(own.x >> 24) * work::kSlice;
      rank = place * work::kSlice;
      slice = static_cast<int>(own.x & 0xFFFFFF) - block.window * (p.r / work::kSlice);
    }
    if (ranks > 0) scale = __ldg(p.scale + place);
  }

  __device__ bool has(int of) const { return of >= slice && of < slice + ranks / work::kSlice; }

  // From its rank j on, up to the slice's end; of segments in boxes of 64 ranks.
  __device__ uint16_t* low(const FewRows& p, int row, int j) const {
    return p.segmented() ? low_of_slice(p, row, slice + j / work::kSlice) + j % work::kSlice : p.low + row * p.low_stride + j;
  }

  __device__ uint16_t* low_of_slice(const FewRows& p, int row, int of) const {
    const int64_t low_row = static_cast<int64_t>(block.low + of / kBoxSlices) * kPairRows + row;
    return p.low + low_row * kBox + of % kBoxSlices * work::kSlice;
  }
};

template <typename T>
__device__ __forceinline__ float add_dot(float sum, const uint4& a, const uint4& b) {
  const uint32_t lhs[4] = {a.x, a.y, a.z, a.w}, rhs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 l = unpack<T>(lhs[i]), r = unpack<T>(rhs[i]);
    sum = fmaf(l.x, r.x, fmaf(l.y, r.y, sum));
  }
  return sum;
}

}  // namespace fused_lora::sm90
