// Sums over tokens whose slices are different items: each adds to what the one before left, in order, so that the bits are
// always the same. A warpgroup's part is kGradientBlocks x 64 columns of a factor's gradient, and of the columns' own sums.
#pragma once

#include "column_sums.cuh"
#include "../elements.cuh"
#include "params.cuh"

namespace fused_lora::sm90 {

template <typename C, typename T>
struct Chain {
  static constexpr int kBlocks = C::kGradientBlocks;
  using Acc = float[kBlocks][C::kBlockR / 2];

  const KernelParams& p;
  const Part& of;
  const Warpgroup& self;
  const Gradient& g;
  const int first_col;
  const int turn;  // the flag to raise, and an item's or a window's bits where it is a multiple of 4: registers are scarce
  const int writer;
  const int level = 0;  // of segments: each has sums of its own

  __device__ bool first() const { return turn & work::kFirst; }
  __device__ bool last() const { return turn & work::kLast; }
  __device__ int flag() const { return (turn & -kChainFlags) + writer; }

  // For the slice before, unless this is the first one.
  __device__ __forceinline__ void await_turn(uint32_t mark) const {
    if (first()) return;
    if (self.thread() == 0) ptx::flag_wait(p.flags + flag() - p.chain_flags, ptx::load_shared_32(mark));
    self.sync();
  }

  // Leaves the sum so far in memory, or after the last slice the whole sum in acc.
  __device__ __forceinline__ void add(Acc& acc) const {
    int64_t before = int64_t{first_col} * C::kBlockR;
    if constexpr (C::kSegmented) before = before * of.segments.levels + level * kBlocks * kBox * C::kBlockR;
    float4* partial = reinterpret_cast<float4*>(g.partial + before) + self.thread();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b, partial += C::kBlockR / 8 * kWarpgroup) {
      if (!last()) {
        store_partial(acc[b], partial);
      } else if (!first()) {
        add_partial(acc[b], partial);
      }
    }
  }

  // Sums of the column that a thread holds: of dy, and with a gain of dy y.
  __device__ __forceinline__ void add_sum(float sum) const {
    sum = summed(sum, 0);
    if (last() && holds_column()) store_as(g.sums, of.bias_dtype, column(), sum);
  }

  __device__ __forceinline__ void add_sums(float sum, float product) const {
    sum = summed(sum, 0);
    product = summed(product, 1);
    if (!last() || !holds_column()) return;
    const int c = column();
    const float gain = of.gain[c], bias = of.bias == nullptr ? 0 : load_as_float(of.bias, of.bias_dtype, c);
    of.dgain[c] = gain == 0 ? 0 : (product - bias * sum) / gain;  // a gain of 0 has left nothing of what it multiplied
    if (g.sums != nullptr) store_as(g.sums, of.bias_dtype, c, sum);
  }

  // Where the copy engine cannot write it: float32, or rows that are no multiple of 16 bytes.
  __device__ __forceinline__ void store(const Acc& acc, int rank = 0) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int c = first_col + b * kBox + self.row();
      int64_t at = c * g.stride_col + (rank + self.col()) * g.stride_rank;
#pragma unroll
      for (int j = 0; j < C::kBlockR / 8; ++j, at += 8 * g.stride_rank) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (c + i / 2 * 8 >= g.cols || 8 * j + self.col() + i % 2 >= of.r) continue;
          store_as(g.out, p.factor_dtype, at + i / 2 * 8 * g.stride_col + i % 2 * g.stride_rank, acc[b][4 * j + i]);
        }
      }
    }
  }

 private:
  using Columns = ColumnSums<C, T>;

  __device__ int column() const { return first_col + Columns::col(self); }
  __device__ bool holds_column() const { return Columns::holds(self) && column() < g.cols; }

  // The sum so far, of one of two kinds: left in memory, or after the last slice the whole one. What all threads agree on is asked
  // first: where only some threads ask it, the compiler takes all that follows for theirs.
  __device__ __forceinline__ float summed(float sum, int kind) const {
    const bool holds = Columns::holds(self);
    float* partial = g.sums_partial + work::kSums * column() + kind;
    if (last()) {
      if (holds && !first()) sum += __ldcg(partial);
    } else if (first()) {
      if (holds) __stcg(partial, sum);
    } else if (holds) {
      ptx::add_float(partial, sum);
    }
    return sum;
  }

  __device__ __forceinline__ void add_partial(float (&acc)[C::kBlockR / 2], const float4* partial) const {
#pragma unroll
    for (int i = 0; i < C::kBlockR / 8; ++i) {
      const float4 v = __ldcg(partial + i * kWarpgroup);
      acc[4 * i] += v.x;
      acc[4 * i + 1] += v.y;
      acc[4 * i + 2] += v.z;
      acc[4 * i + 3] += v.w;
    }
  }

  // The order is the chain's, so the additions need no answer: L2 adds.
  __device__ __forceinline__ void store_partial(const float (&acc)[C::kBlockR / 2], float4* partial) const {
#pragma unroll
    for (int i = 0; i < C::kBlockR / 8; ++i) {
      const float4 v = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
      if (first()) {
        __stcg(partial + i * kWarpgroup, v);
      } else {
        ptx::add_float4(partial + i * kWarpgroup, v);
      }
    }
  }
};

}  // namespace fused_lora::sm90
