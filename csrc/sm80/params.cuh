// What a launch passes to its kernel; the products are those of sm90/params.cuh.
#pragma once

#include "../gated.cuh"
#include "../lora_linear.h"
#include "../work/item.h"
#include "stage.cuh"

namespace fused_lora::sm80 {

using work::Item;
using work::Work;

// A factor's gradient: sums over tokens of big (M, cols) times low (M, r), in slices of tokens, chained in order.
struct Gradient {
  Matrix big, low;
  void* out;  // element (col, rank) at col * stride_col + rank * stride_rank; null where only sums are wanted
  int64_t stride_col, stride_rank;
  int cols;
  float* partial;
  void* sums;  // of big over tokens, (cols,), or null
  float* sums_partial;
};

// One linear of a group. With segments down and up are slabs whose rows are ranks, A and B^T or the other way round, and low is in
// boxes (work/segments.h).
struct Part {
  Matrix lhs, weight, down, low, up, out;
  int cols, depth, r;
  const float* scale;
  Dropout dropout;
  const float* gain;  // of out's columns, or null for 1
  const void* bias;
  DType bias_dtype;
  Gradient dA, dB;
  work::Segments segments;
};

struct KernelParams {
  const Item* list;
  int items;
  int low_flags, chain_flags;  // of each part, one part's after another's; of all gradients, a slice's after another's
  int half_flags;              // the first one of the items in two halves, of which each has one
  float* half_sums;            // and their places
  int row_flags, rank;         // flags of an item's rows of low: one for each of its items; ranks of all of those, or of a window
  work::Counters* counters;
  int* flags;
  int M, parts, summed;
  DType factor_dtype;
  Part part[kMostParts];
  Gated gated;
};

}  // namespace fused_lora::sm80
