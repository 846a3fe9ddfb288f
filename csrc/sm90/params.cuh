// What a launch passes to its kernel.
//
//                  lhs   weight   down   low   up   out
//   forward        x     W        A      xa    B    y       out = gain (lhs W^T + low up^T) + bias  the right operands K-major
//   backward       dy    W        B      dxa   A    dx      out = lhs W + low up                the right operands MN-major
//                                                           low = scale lhs down^T | down
// Backward with a gain, W and B come multiplied by it. With segments A and B^T are slabs, and lie the same in both passes.
// With dropout: forward, low is of the masked x; backward, low up and dA's x are masked. In both passes low counts 1 / (1 - p)
// times, and nothing else does.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../gated.cuh"
#include "../lora_linear.h"
#include "../work/item.h"
#include "../work/ring.h"
#include "../work/segments.h"

namespace fused_lora::sm90 {

// A factor's gradient: sums over tokens of big (M, cols) times low (M, r), in slices of tokens, chained in order.
struct Gradient {
  CUtensorMap big, low, result;
  bool copied;  // result is valid: 16 bits, rows a multiple of 16 bytes
  void* out;    // element (col, rank) at col * stride_col + rank * stride_rank; null where only sums are wanted
  int64_t stride_col, stride_rank;
  int cols;
  float* partial;
  void* sums;      // of big over tokens, (cols,), or null
  float* sums_partial;  // two a column: those sums, and dgain's
};

// One linear of a group. Forward all read one lhs; backward the summed ones add to one out, which is the first's.
struct Part {
  uint16_t* out_data;  // where the copy engine cannot write out, whose rows start anywhere: its elements; else null
  uint16_t* ring;      // where its weight is dequantised, as `weight` has it; null for one of 16 bits
  int cols, depth, r;  // out (M, cols), sums over depth
  void* low_data;
  int64_t low_stride;
  const float* scale;
  Dropout dropout;
  const float* gain;  // of y's columns, or null for 1
  const void* bias;
  DType bias_dtype;  // of bias or its gradient
  float* dgain;      // backward: (depth,), or null, when y is not read
  CUtensorMap lhs, weight, down, low, up, out, y;
  Gradient dA, dB;
  work::Segments segments;
  Stored stored;
};

// What is read first lies together: each line of the constant cache comes from memory at a launch's start.
struct KernelParams {
  const work::Item* list;
  int items;
  int low_flags, chain_flags;  // of each part, one part's after another's; of all gradients, a slice's after another's
  work::Counters* counters;
  int* flags;
  int M, parts, summed;  // summed: those that tiles are made of, which come first
  int finish_spacing;    // steps of a tile between boxes of the one before that leave for the finisher
  bool rows_start_anywhere;  // in some part's out
  DType factor_dtype;        // of A's and B's gradients
  work::Ring ring;
  int64_t ring_stride;
  Part part[kMostParts];
  Gated gated;
  CUtensorMap down_riding;
};

}  // namespace fused_lora::sm90
