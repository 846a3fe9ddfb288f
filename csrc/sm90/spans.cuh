// Segments as this architecture's items go through them.
#pragma once

#include "../spans.cuh"
#include "params.cuh"
#include "pipeline.cuh"

namespace fused_lora::sm90 {

template <typename C>
struct Span : fused_lora::Span {
  __device__ Span(const work::Segments& of, int level, int row) : fused_lora::Span(of, C::kBlockR, level, row) {}
};

// A window's rows are read in whole steps.
template <typename C>
struct Windows : fused_lora::Windows {
  __device__ Windows(const work::Segments& of, int level, const Item& item, int M) : fused_lora::Windows(of, C::kBlockR, level, item, M) {}

  __device__ int first_step_row() const { return first_row() / kBox * kBox; }
  __device__ int steps() const { return has_rows() ? ceil_div(end_row() - first_step_row(), kBox) : 0; }

  // Of a step's rows, those that are its.
  __device__ int first_own(int step) const { return own.y - first_step_row() - step * kBox; }
  __device__ int end_own(int step) const { return end_row() - first_step_row() - step * kBox; }
};

}  // namespace fused_lora::sm90
