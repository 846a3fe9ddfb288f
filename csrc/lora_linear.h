// Parameters and launchers of LoRA linears. Knows memory and streams, nothing of torch.
//
//   forward    xa  = scale x A^T      y  = gain (x W^T + xa B^T) + bias, gain and bias of each column
//   backward   dxa = scale dy B       dx = dy W + dxa A       dA = dxa^T x       dB = dy^T xa       dbias = sum of dy
//              with a gain W and B are gain W and gain B, dB = gain dy^T xa and dgain = sum of dy (y - bias) / gain
//
// In float16 the power of two above a scale above 1 stays out of xa and enters y and dB, so that xa is finite.
// With dropout, x is masked in xa and dA, and dxa A in dx; what is kept counts 1 / (1 - p) times.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "formats.h"
#include "work/segments.h"

namespace fused_lora {

namespace work {  // whose files know the structs below
struct Item;
struct Pass;
struct Plan;
}  // namespace work

constexpr int kSegmentRows = 256;  // of a block of segments, on every card
constexpr int kMaxRank = 256, kMaxGatedRank = 128;
constexpr int64_t kMostStride = int64_t{1} << 22;  // elements from a row to the next one: csrc/sm80 adds up bytes of rows in an int

// A matrix that a kernel reads or writes: rows contiguous, stride in elements. Without data it is not wanted.
// What is read in steps has 16-bit elements, and data and rows that start at multiples of 16 bytes; y, dx, dA, dB, bias and dbias
// are contiguous instead.
struct Operand {
  void* data;
  DType format;
  int64_t rows, cols, stride;
};

// Of x on its way to A. mask.cuh has the hash.
struct Dropout {
  const int64_t* seed;  // on the device; null where nothing is dropped
  uint32_t threshold;   // its lower half: the first of the numbers that are dropped, up to 0x7C00; 2^16: they are kept instead
  float keep_scale;     // 1 / (1 - p); 1 where nothing is dropped
};

constexpr int kMostParts = 4;  // linears that read one x

// act(t) = t sigmoid(t (linear + cubic t^2)): SiLU, or GELU in its tanh form.
struct Activation {
  float linear, cubic;
};

// One of them. A.rows = 0: it has no factors. With segments A and B are slabs (work/segments.h), and xa and dxa boxes of 64 ranks and
// the rows of a block, one behind another.
struct ForwardPart {
  Operand weight, A, B, bias, xa, y;  // of a weight in a format the operand has sizes alone
  const float* gain;   // (y.cols,), or null for 1
  const float* scale;  // on the device
  Dropout dropout;
  work::Segments segments;
  Stored stored;  // csrc/sm90 alone
};

struct ForwardParams {
  Operand x;
  int parts;
  ForwardPart part[kMostParts];
  int window;  // ranks of a window, where rows have adapters of their own; else 0
  // Two parts of the same width with `gated`: hidden = act(y of the first) y of the second as well, and their ys only where
  // they have data; with `factors` instead of them act(gate) and act'(gate) up. All three aligned to 16 bytes, with one stride.
  bool gated, factors;
  Activation activation;
  Operand hidden;
};

struct BackwardPart {
  Operand dy, x, weight, A, B, xa, dxa;
  Operand dA, dB, dbias;  // dA and dB have one format
  const float* gain;  // by which weight and B, where they are read, were multiplied; or null. csrc/sm90 alone
  const float* scale;
  Dropout dropout;
  Operand y, bias;  // for dgain, bias where there was one
  float* dgain;     // null where it is not wanted
  work::Segments segments;
  Stored stored;
};

struct BackwardParams {
  Operand dx;  // the sum over the first `summed` parts, which have the same x
  int parts, summed;  // of the others there is dxa already, and only the gradients of their factors are wanted
  BackwardPart part[kMostParts];
  int window;  // as in ForwardParams; dA and dB are then of the pass's windows, one after another
  // One part whose x is hidden = act(gate) up, with `gated`: no gradients of its factors, and instead of dx come dgate, dup and,
  // where it has data, hidden once more. With `factors`, gate and up are act(gate) and act'(gate) up, and hidden has no data. All
  // aligned to 16 bytes, with one stride.
  bool gated, factors;
  Activation activation;
  Operand gate, up, dgate, dup, hidden;
};

// A device as a pass is cut for it.
struct Card {
  int capability, sms, shared_bytes;  // shared memory that a block may have
};

struct Tile {
  int M, N, K;
};

// What a launch needs beside its operands. Launches that share flags run one after another.
struct Workspace {
  const work::Plan* plan;  // plan_pass()'s, for the current device
  const work::Item* list;  // its items, on the device
  int* flags;              // kCounters + plan->flags, aligned to 16 bytes; zero before the first launch that uses them
  float* partial;          // plan->floats()
  void* ring;              // plan->ring.bytes, aligned to 128 bytes
};
constexpr int kCounters = 8;

// The kernels of an architecture. Sizes M, K, N >= 1; r <= kMaxRank.
#define FUSED_LORA_KERNELS                                                                                          \
  work::Plan plan_pass(const work::Pass& pass, const Card& card);                                                   \
  Tile tile_of(const work::Pass& pass, const Card& card);                                                           \
  cudaError_t launch_forward(const ForwardParams& params, const Workspace& workspace, cudaStream_t stream);         \
  cudaError_t launch_backward(const BackwardParams& params, const Workspace& workspace, cudaStream_t stream);
namespace sm80 {
FUSED_LORA_KERNELS
}
namespace sm90 {
FUSED_LORA_KERNELS

// Forward passes of at most 64 rows, without a list of work (few_rows.cu). Whether that is the way of a part, not gated and without
// dropout; and the launches.
bool takes_few_rows(int64_t M, int64_t N, int64_t K, int64_t r, bool segmented);
cudaError_t launch_few_rows(const ForwardParams& params, cudaStream_t stream);
}  // namespace sm90
#undef FUSED_LORA_KERNELS

}  // namespace fused_lora
