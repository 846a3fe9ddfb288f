// A warpgroup that multiplies: 64 of the 128 rows of a block's tile, and what becomes of the results.
#pragma once

#include "outbox.cuh"

namespace fused_lora::sm90 {

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat16: return __half2float(static_cast<const __half*>(data)[i]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
}

template <typename C, typename T, bool kBackward>
struct Consumer {
  Shared<C>& shared;
  const KernelParams& p;
  const int rank;  // of the block in its cluster
  const Warpgroup self;
  Outbox<C, T> outbox{shared, p, self};
  Ring<C::kStages> ring{};

  __device__ void run(const Item& item) {
    if (item.work == Work::kShrink) return shrink(item);
    if (item.work == Work::kTile) return tile(item);
    if constexpr (kBackward) gradient(item);
  }

  // ---- steps -------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ uint32_t await_stage() {
    ptx::mbarrier_wait(&shared.full[ring.stage], ring.phase);
    return ptx::shared_address(shared.stages[ring.stage]);
  }

  __device__ __forceinline__ void release(int stage) {
    if (self.lane() < kCluster) ptx::mbarrier_arrive_at(&shared.empty[stage], self.lane());
  }

  // multiply(stage's address, step) for each step: one group of products each, of which one is always in flight.
  template <typename Multiply>
  __device__ __forceinline__ void consume(int steps, Multiply multiply) {
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      multiply(await_stage(), step);
      if (step > 0) {
        ptx::wgmma_wait<1>();
        release(previous);
      }
      if (outbox.pending()) outbox.send_part();
      previous = ring.stage;
      ring.advance();
    }
    ptx::wgmma_wait<0>();
    release(previous);
  }

  // The first ceil(left / 16) <= kMost slices of 16 of a step, as one group. Straight code for each count: a group that spans
  // a branch or a loop is cut up by the compiler, and then waited for too early.
  template <int kMost, int kCount>
  __device__ __forceinline__ void multiply_slices(float (&acc)[kCount], uint64_t lhs, uint64_t rhs, int left) {
    if (kMost == 1 || left > (kMost - 1) * 16) {
      ptx::wgmma_fence();
#pragma unroll
      for (int s = 0; s < kMost; ++s) ptx::wgmma<T, false, kBackward>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<kBackward>);
      ptx::wgmma_commit();
    } else if constexpr (kMost > 1) {
      multiply_slices<kMost - 1>(acc, lhs, rhs, left);
    }
  }

  // ---- low = scale lhs down ----------------------------------------------------------------------------------------------

  __device__ void shrink(const Item& item) {
    for (int i = 0, pair = item.row_pair; i < item.count; ++i, pair += item.stride) {
      float acc[C::kBlockR / 2] = {};
      consume(ceil_div(p.K, C::kShrinkHalves * kBox), [&](uint32_t stage, int) {
        ptx::wgmma_fence();
#pragma unroll
        for (int half = 0; half < C::kShrinkHalves; ++half) {
          const uint64_t lhs = descriptor<false>(stage + (2 * half + self.index) * kBoxBytes);
          const uint64_t rhs = descriptor<kBackward>(stage + (2 * C::kShrinkHalves + half * boxes_of(C::kBlockR)) * kBoxBytes);
#pragma unroll
          for (int s = 0; s < kSlices; ++s) ptx::wgmma<T, false, kBackward>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<kBackward>);
        }
        ptx::wgmma_commit();
      });
      scale_by(acc, *p.scale);
      const int tile_row = pair * kPairRows + rank * kBlockM;
      outbox.keep(acc, &p.low, tile_row + self.index * kBox, 0, p.ready + tile_row / kBlockM);
      outbox.send_boxes();  // somebody may wait already
    }
  }

  template <int kCount>
  __device__ void scale_by(float (&acc)[kCount], float scale) {
#pragma unroll
    for (float& value : acc) value *= scale;
  }

  // ---- out = lhs weight + low up + bias ------------------------------------------------------------------------------------

  __device__ void tile(const Item& item) {
    // With few steps, those over r come while a flag is pending here, and may wait for it.
    if (boxes_of(p.K) <= outbox.kMostBoxes + outbox.kFlagParts) outbox.send_flag();
    float acc[C::kBlockN / 2] = {};
    const int tile_row = item.row_pair * kPairRows + rank * kBlockM;
    if (rides<C, kBackward>(p.schedule, item)) {
      if constexpr (C::kCanRide && !kBackward) multiply_riding(acc, tile_row);
    } else {
      multiply_tile(acc);
    }
    if (p.bias != nullptr) add_bias(acc, item.col * C::kBlockN);
    outbox.keep(acc, &p.out, tile_row + self.index * kBox, item.col * C::kBlockN, nullptr);
  }

  __device__ __forceinline__ void multiply_tile(float (&acc)[C::kBlockN / 2]) {
    const int steps = boxes_of(p.K);
    consume(steps + boxes_of(p.r), [&](uint32_t stage, int step) {
      const uint64_t lhs = descriptor<false>(stage + self.index * kBoxBytes), rhs = descriptor<kBackward>(stage + 2 * kBoxBytes);
      multiply_slices<kSlices>(acc, lhs, rhs, step < steps ? kBox : p.r - (step - steps) * kBox);
    });
  }

  // With 16 more columns, which are low; it is multiplied from registers, and stored for the other tiles of these rows.
  __device__ __forceinline__ void multiply_riding(float (&acc)[C::kBlockN / 2], int tile_row) {
    float low[8] = {};
    consume(boxes_of(p.K), [&](uint32_t stage, int) {
      const uint64_t lhs = descriptor<false>(stage + self.index * kBoxBytes), rhs = descriptor<false>(stage + 2 * kBoxBytes);
      const uint64_t down = descriptor<false>(stage + C::kTileBoxes * kBoxBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        ptx::wgmma<T, false, false>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<false>);
        ptx::wgmma<T, false, false>(low, lhs + s * kSlice<false>, down + s * kSlice<false>);
      }
      ptx::wgmma_commit();
    });
    scale_by(low, *p.scale);
    const uint32_t rounded[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(low[4], low[5]), pack<T>(low[6], low[7])};
    const uint64_t up = descriptor<false>(await_stage() + 2 * kBoxBytes);
    ptx::wgmma_fence();
    ptx::wgmma<T, false>(acc, rounded, up);
    ptx::wgmma_commit();
    store_riding_low(rounded, tile_row);
    ptx::wgmma_wait<0>();
    release(ring.stage);
    ring.advance();
  }

  __device__ void store_riding_low(const uint32_t (&rounded)[4], int tile_row) {
    T* low = static_cast<T*>(p.low_data);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = tile_row + self.index * kBox + self.row() + i % 2 * 8;
      const int c = i / 2 * 8 + self.col();
      if (at < p.M && c < p.low_stride) *reinterpret_cast<uint32_t*>(low + at * p.low_stride + c) = rounded[i];
    }
    if (p.schedule.low_is_awaited()) outbox.raise(p.ready + tile_row / kBlockM, false);
  }

  __device__ void add_bias(float (&acc)[C::kBlockN / 2], int first_col) {
#pragma unroll
    for (int j = 0; j < C::kBlockN / 8; ++j) {
      const int c = first_col + 8 * j + self.col();
      if (c >= p.N) continue;
      const float a = load_as_float(p.bias, p.bias_dtype, c), b = load_as_float(p.bias, p.bias_dtype, c + 1);
      acc[4 * j] += a;
      acc[4 * j + 1] += b;
      acc[4 * j + 2] += a;
      acc[4 * j + 3] += b;
    }
  }

  // ---- dA = dxa^T x, dB = dy^T xa --------------------------------------------------------------------------------------------

  __device__ void gradient(const Item& item) {
    constexpr int kBlocks = C::kGradientBlocks;
    const Gradient& g = item.work == Work::kGradientA ? p.dA : p.dB;
    const int slice = item.row_pair / p.schedule.slice_pairs;
    const int tokens = min(p.M - item.row_pair * kPairRows, p.schedule.slice_pairs * kPairRows);
    outbox.send_flag();  // the first step may wait for it
    float acc[kBlocks][C::kBlockR / 2] = {};
    consume(boxes_of(tokens), [&](uint32_t stage, int) {
      const uint64_t low = descriptor<true>(stage + C::kGradientCols / kBox * kBoxBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint64_t big = descriptor<true>(stage + (self.index * kBlocks + b) * kBoxBytes);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) ptx::wgmma<T, true, true>(acc[b], big + s * kSlice<true>, low + s * kSlice<true>);
      }
      ptx::wgmma_commit();
    });
    outbox.send_all();
    const int part = (item.col * kCluster + rank) * kConsumers + self.index;
    const bool first = slice == 0, last = slice + 1 == p.schedule.slices();
    int* chain = g.chain + part;
    if (!first) {
      if (self.thread() == 0) {
        ptx::flag_wait(chain, slice);
        if (last) *chain = 0;  // as the next launch needs it
      }
      self.sync();
    }
    float4* partial = reinterpret_cast<float4*>(g.partial + int64_t{part} * kBlocks * kBox * C::kBlockR) + self.thread();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b, partial += C::kBlockR / 8 * kWarpgroup) {
      if (!last) {
        store_partial(acc[b], partial, first);
      } else if (!first) {
        add_partial(acc[b], partial);
      }
    }
    if (!last) return outbox.hold(0, chain);
    const int first_col = part * kBlocks * kBox;
    if (g.copied) {
      outbox.keep_gradient(acc, g, first_col);
    } else {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) store_gradient(acc[b], g, first_col + b * kBox);
    }
  }

  __device__ void add_partial(float (&acc)[C::kBlockR / 2], const float4* partial) {
#pragma unroll
    for (int i = 0; i < C::kBlockR / 8; ++i) {
      const float4 v = __ldcg(partial + i * kWarpgroup);
      acc[4 * i] += v.x;
      acc[4 * i + 1] += v.y;
      acc[4 * i + 2] += v.z;
      acc[4 * i + 3] += v.w;
    }
  }

  // The chain makes the order of the additions, so they need no answer: L2 adds.
  __device__ void store_partial(const float (&acc)[C::kBlockR / 2], float4* partial, bool first) {
#pragma unroll
    for (int i = 0; i < C::kBlockR / 8; ++i) {
      const float4 v = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
      if (first) {
        __stcg(partial + i * kWarpgroup, v);
      } else {
        ptx::add_float4(partial + i * kWarpgroup, v);
      }
    }
  }

  // Where the copy engine cannot write it: float32, or rows that are no multiple of 16 bytes.
  __device__ void store_gradient(const float (&acc)[C::kBlockR / 2], const Gradient& g, int first_col) {
    const int c = first_col + self.row();
    int64_t at = c * g.stride_col + self.col() * g.stride_rank;
#pragma unroll
    for (int j = 0; j < C::kBlockR / 8; ++j, at += 8 * g.stride_rank) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i / 2 * 8 >= g.cols || 8 * j + self.col() + i % 2 >= p.r) continue;
        store_factor(g.out, at + i / 2 * 8 * g.stride_col + i % 2 * g.stride_rank, acc[4 * j + i]);
      }
    }
  }

  __device__ void store_factor(void* out, int64_t at, float value) {
    if (p.factor_dtype == DType::kFloat32) {
      static_cast<float*>(out)[at] = value;
    } else {
      static_cast<T*>(out)[at] = Round<T>::one(value);
    }
  }
};

}  // namespace fused_lora::sm90
