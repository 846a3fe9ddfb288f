// A warpgroup that multiplies: 64 of the 128 rows of a block's tile, and what becomes of the results.
#pragma once

#include "fragments.cuh"
#include "params.cuh"
#include "pipeline.cuh"

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
  const int rank;       // of the block in its cluster
  const int warpgroup;  // 0 or 1
  Ring<C::kStages> ring{};

  // The tile before, rounded, on its way out while the next one is multiplied: pending[part * 16 ...] of 64 columns each.
  static constexpr int kParts = C::kBlockN / kBox;
  uint32_t pending[kParts * 16];
  int pending_row, pending_col, parts_stored = kParts;

  __device__ int thread() const { return threadIdx.x % kWarpgroup; }
  __device__ int lane() const { return threadIdx.x % 32; }
  // Where in the 64 rows and in each 8 columns of an accumulator this thread's values lie: rows row() and row() + 8.
  __device__ int row() const { return thread() / 32 * 16 + lane() / 4; }
  __device__ int col() const { return lane() % 4 * 2; }
  __device__ void sync() const { ptx::named_barrier(1 + warpgroup, kWarpgroup); }

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
    if (lane() < kCluster) ptx::mbarrier_arrive_at(&shared.empty[stage], lane());
  }

  // multiply(stage's address, step) for each step: one group of products each, of which one is always in flight.
  template <typename Multiply>
  __device__ __forceinline__ void consume(int steps, Multiply multiply) {
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t stage = await_stage();
      ptx::wgmma_fence();
      multiply(stage, step);
      if (parts_stored < kParts) store_part();
      if (step > 0) {
        ptx::wgmma_wait<1>();
        release(previous);
      }
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
#pragma unroll
      for (int s = 0; s < kMost; ++s) ptx::wgmma<T, false, kBackward>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<kBackward>);
      ptx::wgmma_commit();
    } else if constexpr (kMost > 1) {
      multiply_slices<kMost - 1>(acc, lhs, rhs, left);
    }
  }

  // ---- low = scale lhs down ----------------------------------------------------------------------------------------------

  __device__ void shrink(const Item& item) {
    const int end = min(p.schedule.row_pairs, (item.row_pair / kGroupPairs + 1) * kGroupPairs);
    for (int pair = item.row_pair; pair < end; pair += item.group) {
      float acc[C::kBlockR / 2] = {};
      consume((p.K + C::kShrinkHalves * kBox - 1) / (C::kShrinkHalves * kBox), [&](uint32_t stage, int) {
#pragma unroll
        for (int half = 0; half < C::kShrinkHalves; ++half) {
          const uint64_t lhs = descriptor<false>(stage + (2 * half + warpgroup) * kBoxBytes);
          const uint64_t rhs = descriptor<kBackward>(stage + (2 * C::kShrinkHalves + half * boxes_of(C::kBlockR)) * kBoxBytes);
#pragma unroll
          for (int s = 0; s < kSlices; ++s) ptx::wgmma<T, false, kBackward>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<kBackward>);
        }
        ptx::wgmma_commit();
      });
      scale_by(acc, *p.scale);
      store_low(acc, pair * kPairRows + rank * kBlockM);
    }
  }

  template <int kCount>
  __device__ void scale_by(float (&acc)[kCount], float scale) {
#pragma unroll
    for (float& value : acc) value *= scale;
  }

  // Its 64 of the 128 rows, then the flag.
  template <int kCount>
  __device__ void store_low(const float (&acc)[kCount], int tile_row) {
    T* low = static_cast<T*>(p.low_data);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = tile_row + warpgroup * kBox + row() + 8 * half;
      if (at >= p.M) continue;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        const int c = 8 * j + col();
        const float a = acc[4 * j + 2 * half], b = acc[4 * j + 2 * half + 1];
        if (c + 1 < p.r) {
          *reinterpret_cast<uint32_t*>(low + at * p.low_stride + c) = pack<T>(a, b);
        } else if (c < p.r) {
          low[at * p.low_stride + c] = Round<T>::one(a);
        }
      }
    }
    if (!p.schedule.low_is_awaited()) return;
    // Copies of other blocks read what ordinary writes wrote.
    ptx::fence_async_global();
    __threadfence();
    sync();
    if (thread() == 0) ptx::flag_add_release(p.ready + tile_row / kBlockM, 1);
  }

  // ---- out = lhs weight + low up + bias ------------------------------------------------------------------------------------

  __device__ void tile(const Item& item) {
    float acc[C::kBlockN / 2] = {};
    const int tile_row = item.row_pair * kPairRows + rank * kBlockM;
    if (C::kCanRide && p.schedule.rides && item.col == 0) {
      multiply_riding(acc, tile_row);
    } else {
      multiply_tile(acc);
    }
    while (parts_stored < kParts) store_part();
    if (p.bias != nullptr) add_bias(acc, item.col * C::kBlockN);
    keep(acc, tile_row + warpgroup * kBox, item.col * C::kBlockN);
  }

  __device__ __forceinline__ void multiply_tile(float (&acc)[C::kBlockN / 2]) {
    const int steps = boxes_of(p.K);
    consume(steps + boxes_of(p.r), [&](uint32_t stage, int step) {
      const uint64_t lhs = descriptor<false>(stage + warpgroup * kBoxBytes), rhs = descriptor<kBackward>(stage + 2 * kBoxBytes);
      multiply_slices<kSlices>(acc, lhs, rhs, step < steps ? kBox : p.r - (step - steps) * kBox);
    });
  }

  // With 16 more columns, which are low; it is multiplied from registers, and stored for the other tiles of these rows.
  __device__ __forceinline__ void multiply_riding(float (&acc)[C::kBlockN / 2], int tile_row) {
    float low[8] = {};
    consume(boxes_of(p.K), [&](uint32_t stage, int) {
      const uint64_t lhs = descriptor<false>(stage + warpgroup * kBoxBytes), rhs = descriptor<kBackward>(stage + 2 * kBoxBytes);
      const uint64_t down = riding_descriptor<kBackward>(stage + C::kTileBoxes * kBoxBytes);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        ptx::wgmma<T, false, kBackward>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<kBackward>);
        ptx::wgmma<T, false, kBackward>(low, lhs + s * kSlice<false>, down + s * kRidingSlice<kBackward>);
      }
      ptx::wgmma_commit();
    });
    scale_by(low, *p.scale);
    const uint32_t rounded[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(low[4], low[5]), pack<T>(low[6], low[7])};
    const uint64_t up = descriptor<kBackward>(await_stage() + 2 * kBoxBytes);
    ptx::wgmma_fence();
    ptx::wgmma<T, kBackward>(acc, rounded, up);
    ptx::wgmma_commit();
    store_low(low, tile_row);
    ptx::wgmma_wait<0>();
    release(ring.stage);
    ring.advance();
  }

  __device__ void add_bias(float (&acc)[C::kBlockN / 2], int first_col) {
#pragma unroll
    for (int j = 0; j < C::kBlockN / 8; ++j) {
      const int c = first_col + 8 * j + col();
      if (c >= p.N) continue;
      const float a = load_as_float(p.bias, p.bias_dtype, c), b = load_as_float(p.bias, p.bias_dtype, c + 1);
      acc[4 * j] += a;
      acc[4 * j + 1] += b;
      acc[4 * j + 2] += a;
      acc[4 * j + 3] += b;
    }
  }

  __device__ __forceinline__ void keep(const float (&acc)[C::kBlockN / 2], int first_row, int first_col) {
#pragma unroll
    for (int i = 0; i < kParts * 16; ++i) pending[i] = pack<T>(acc[2 * i], acc[2 * i + 1]);
    pending_row = first_row;
    pending_col = first_col;
    parts_stored = 0;
  }

  __device__ __forceinline__ void store_part() {
    switch (parts_stored) {
      case 0: store_columns<0>(); break;
      case 1: store_columns<1>(); break;
      case 2: store_columns<2 % kParts>(); break;
      default: store_columns<3 % kParts>(); break;
    }
    ++parts_stored;
  }

  template <int kPart>
  __device__ __forceinline__ void store_columns() {
    const uint32_t buffer = ptx::shared_address(shared.out[warpgroup]);
    const int matrix_row = thread() / 32 * 16 + lane() % 16;
    if (thread() == 0) ptx::tma_store_wait_read<0>();
    sync();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int chunk = 2 * j + lane() / 16;
      const uint32_t* v = pending + kPart * 16 + j * 4;
      ptx::stmatrix(buffer + matrix_row * 128 + ((chunk ^ matrix_row % 8) << 4), {v[0], v[1], v[2], v[3]});
    }
    ptx::fence_async_shared();
    sync();
    if (thread() == 0) {
      ptx::tma_store(&p.out, pending_row, pending_col + kPart * kBox, buffer);
      ptx::tma_store_commit();
    }
  }

  __device__ void finish() {
    while (parts_stored < kParts) store_part();
    ptx::tma_store_wait_read<0>();
  }

  // ---- dA = dxa^T x, dB = dy^T xa --------------------------------------------------------------------------------------------

  __device__ void gradient(const Item& item) {
    constexpr int kBlocks = C::kGradientBlocks;
    const Gradient& g = item.work == Work::kGradientA ? p.dA : p.dB;
    const int tokens = min(p.M - item.group * kGroupRows, kGroupRows);
    float acc[kBlocks][C::kBlockR / 2] = {};
    consume(boxes_of(tokens), [&](uint32_t stage, int) {
      const uint64_t low = descriptor<true>(stage + C::kGradientCols / kBox * kBoxBytes);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint64_t big = descriptor<true>(stage + (warpgroup * kBlocks + b) * kBoxBytes);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) ptx::wgmma<T, true, true>(acc[b], big + s * kSlice<true>, low + s * kSlice<true>);
      }
      ptx::wgmma_commit();
    });
    const int part = (item.col * kCluster + rank) * kConsumers + warpgroup;
    const bool first = item.group == 0, last = item.group + 1 == p.schedule.groups;
    int* chain = g.chain + part;
    if (!first) {
      if (thread() == 0) {
        ptx::flag_wait(chain, item.group);
        if (last) *chain = 0;  // as the next launch needs it
      }
      sync();
    }
    float4* partial = reinterpret_cast<float4*>(g.partial + int64_t{part} * kBlocks * kBox * C::kBlockR) + thread();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b, partial += C::kBlockR / 8 * kWarpgroup) {
      if (last) {
        if (!first) add_partial(acc[b], partial);
        store_gradient(acc[b], g, (part * kBlocks + b) * kBox);
      } else {
        store_partial(acc[b], partial, first);
      }
    }
    if (!last) {
      __threadfence();
      sync();
      if (thread() == 0) ptx::flag_add_release(chain, 1);
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

  // The two gradients differ in which index is contiguous: scalar stores, once per launch.
  __device__ void store_gradient(const float (&acc)[C::kBlockR / 2], const Gradient& g, int first_col) {
    const int c = first_col + row();
    int64_t at = c * g.stride_col + col() * g.stride_rank;
#pragma unroll
    for (int j = 0; j < C::kBlockR / 8; ++j, at += 8 * g.stride_rank) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i / 2 * 8 >= g.cols || 8 * j + col() + i % 2 >= p.r) continue;
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
