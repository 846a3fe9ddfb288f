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

  // A result, rounded, on its way out while the next item is multiplied, a part a step: boxes of 64 x 64 in 16 registers each,
  // and where somebody waits for the result, a step in which its bytes arrive, and then its flag.
  static constexpr int kMostBoxes = C::kBlockN / kBox;
  static constexpr int kFlagParts = 2;
  uint32_t pending[kMostBoxes][16];
  const CUtensorMap* pending_map;
  int pending_row, pending_col;
  bool pending_across;  // registers hold the transpose
  int* pending_flag = nullptr;
  int next_part = 0, pending_boxes = 0, parts = 0;  // parts: boxes, and kFlagParts with a flag

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
      multiply(await_stage(), step);
      if (step > 0) {
        ptx::wgmma_wait<1>();
        release(previous);
      }
      if (next_part < parts) store_part();
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
      consume((p.K + C::kShrinkHalves * kBox - 1) / (C::kShrinkHalves * kBox), [&](uint32_t stage, int) {
        ptx::wgmma_fence();
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
      const int tile_row = pair * kPairRows + rank * kBlockM;
      keep(acc, &p.low, tile_row + warpgroup * kBox, 0);
      hold(boxes_of(C::kBlockR), p.ready + tile_row / kBlockM);
      while (next_part < pending_boxes) store_part();  // somebody may wait already
    }
  }

  template <int kCount>
  __device__ void scale_by(float (&acc)[kCount], float scale) {
#pragma unroll
    for (float& value : acc) value *= scale;
  }

  // ---- out = lhs weight + low up + bias ------------------------------------------------------------------------------------

  __device__ void tile(const Item& item) {
    if (boxes_of(p.K) <= kMostBoxes + kFlagParts) raise_pending();
    float acc[C::kBlockN / 2] = {};
    const int tile_row = item.row_pair * kPairRows + rank * kBlockM;
    if (C::kCanRide && p.schedule.rides && item.col == 0) {
      multiply_riding(acc, tile_row);
    } else {
      multiply_tile(acc);
    }
    if (p.bias != nullptr) add_bias(acc, item.col * C::kBlockN);
    keep(acc, &p.out, tile_row + warpgroup * kBox, item.col * C::kBlockN);
    hold(kMostBoxes, nullptr);
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
      ptx::wgmma_fence();
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
    store_riding_low(rounded, tile_row);
    ptx::wgmma_wait<0>();
    release(ring.stage);
    ring.advance();
  }

  __device__ void store_riding_low(const uint32_t (&rounded)[4], int tile_row) {
    T* low = static_cast<T*>(p.low_data);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = tile_row + warpgroup * kBox + row() + i % 2 * 8;
      const int c = i / 2 * 8 + col();
      if (at < p.M && c < p.low_stride) *reinterpret_cast<uint32_t*>(low + at * p.low_stride + c) = rounded[i];
    }
    if (p.schedule.low_is_awaited()) raise(p.ready + tile_row / kBlockM, false);
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

  // ---- results on their way out ----------------------------------------------------------------------------------------------

  // A 64 x 2 kCount result as boxes from `first_box` on, to lie at (row, col) of the map's matrix.
  template <int kCount>
  __device__ __forceinline__ void keep(const float (&acc)[kCount], const CUtensorMap* map, int row, int col) {
    store_parts();
    pack_boxes<0>(acc);
    pending_map = map;
    pending_row = row;
    pending_col = col;
    pending_across = false;
  }

  template <int kFirstBox, int kCount>
  __device__ __forceinline__ void pack_boxes(const float (&acc)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pending[kFirstBox + i / 16][i % 16] = pack<T>(acc[2 * i], acc[2 * i + 1]);
  }

  __device__ __forceinline__ void hold(int boxes, int* flag) {
    next_part = 0;
    pending_boxes = boxes;
    pending_flag = flag;
    parts = boxes + (flag == nullptr ? 0 : kFlagParts);
  }

  __device__ __forceinline__ void store_parts() {
    while (next_part < parts) store_part();
  }

  // Before steps that may wait for a flag which is still pending here.
  __device__ __forceinline__ void raise_pending() {
    if (pending_flag != nullptr) store_parts();
  }

  __device__ __forceinline__ void store_part() {
    if (next_part < pending_boxes) {
      const uint32_t buffer = ptx::shared_address(shared.out[warpgroup]);
      if (thread() == 0) ptx::tma_store_wait_read<0>();
      sync();
      switch (next_part) {
        case 0: write_box<0>(buffer); break;
        case 1: write_box<1 % kMostBoxes>(buffer); break;
        case 2: write_box<2 % kMostBoxes>(buffer); break;
        default: write_box<3 % kMostBoxes>(buffer);
      }
      ptx::fence_async_shared();
      sync();
      if (thread() == 0) copy_out(buffer, next_part);
    } else if (next_part + 1 == parts) {
      raise(pending_flag, pending_boxes > 0);
    }
    ++next_part;
  }

  // A box to shared memory, its 16-byte chunks where the 128-byte swizzle has them.
  template <int kBoxIndex>
  __device__ __forceinline__ void write_box(uint32_t buffer) {
    const int warp = thread() / 32, low_bit = lane() / 8 % 2, high_bit = lane() / 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t(&v)[16] = pending[kBoxIndex];
      const uint32_t pairs[4] = {v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]};
      if (pending_across) {
        const int row = 16 * j + 8 * high_bit + lane() % 8, chunk = 2 * warp + low_bit;
        ptx::stmatrix_transposed(buffer + row * 128 + ((chunk ^ row % 8) << 4), pairs);
      } else {
        const int row = 16 * warp + 8 * low_bit + lane() % 8, chunk = 2 * j + high_bit;
        ptx::stmatrix(buffer + row * 128 + ((chunk ^ row % 8) << 4), pairs);
      }
    }
  }

  // Boxes lie side by side, but for those of a gradient, boxes_of(r) for each 64 of its columns.
  __device__ __forceinline__ void copy_out(uint32_t buffer, int box) {
    const int ranks = boxes_of(C::kBlockR), across = box / ranks * kBox, along = box % ranks * kBox;
    const bool gradient = pending_map != &p.out && pending_map != &p.low;
    const int row = pending_row + (!gradient ? 0 : pending_across ? along : across);
    const int col = pending_col + (!gradient ? box * kBox : pending_across ? across : along);
    ptx::tma_store(pending_map, row, col, buffer);
    ptx::tma_store_commit();
  }

  // Tells readers in other blocks that what this warpgroup wrote is there: by copies, which are one thread's, or by everybody.
  __device__ void raise(int* flag, bool copied) {
    if (!copied) {
      __threadfence();
      sync();
    }
    if (thread() == 0) {
      ptx::tma_store_wait();
      ptx::fence_async_global();
      ptx::flag_add_release(flag, 1);
    }
  }

  // After the last item. A whole tile goes out at once through stages, which nothing fills any more.
  __device__ void finish() {
    if (next_part == 0 && pending_boxes == kMostBoxes && pending_map == &p.out) {
      ptx::named_barrier(3, kConsumers * kWarpgroup);
      const uint32_t buffers = ptx::shared_address(shared.stages[warpgroup]);
      write_boxes<0>(buffers);
      ptx::fence_async_shared();
      sync();
      if (thread() < parts) copy_out(buffers + thread() * kBoxBytes, thread());
    } else {
      store_parts();
    }
    ptx::tma_store_wait_read<0>();
  }

  template <int kFirst>
  __device__ __forceinline__ void write_boxes(uint32_t buffers) {
    write_box<kFirst>(buffers + kFirst * kBoxBytes);
    if constexpr (kFirst + 1 < kMostBoxes) write_boxes<kFirst + 1>(buffers);
  }

  // ---- dA = dxa^T x, dB = dy^T xa --------------------------------------------------------------------------------------------

  __device__ void gradient(const Item& item) {
    constexpr int kBlocks = C::kGradientBlocks;
    const Gradient& g = item.work == Work::kGradientA ? p.dA : p.dB;
    const int slice = item.row_pair / p.schedule.slice_pairs;
    const int tokens = min(p.M - item.row_pair * kPairRows, p.schedule.slice_pairs * kPairRows);
    raise_pending();
    float acc[kBlocks][C::kBlockR / 2] = {};
    consume(boxes_of(tokens), [&](uint32_t stage, int) {
      const uint64_t low = descriptor<true>(stage + C::kGradientCols / kBox * kBoxBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint64_t big = descriptor<true>(stage + (warpgroup * kBlocks + b) * kBoxBytes);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) ptx::wgmma<T, true, true>(acc[b], big + s * kSlice<true>, low + s * kSlice<true>);
      }
      ptx::wgmma_commit();
    });
    store_parts();
    const int part = (item.col * kCluster + rank) * kConsumers + warpgroup;
    const bool first = slice == 0, last = slice + 1 == p.schedule.slices();
    int* chain = g.chain + part;
    if (!first) {
      if (thread() == 0) {
        ptx::flag_wait(chain, slice);
        if (last) *chain = 0;  // as the next launch needs it
      }
      sync();
    }
    float4* partial = reinterpret_cast<float4*>(g.partial + int64_t{part} * kBlocks * kBox * C::kBlockR) + thread();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b, partial += C::kBlockR / 8 * kWarpgroup) {
      if (!last) {
        store_partial(acc[b], partial, first);
      } else if (!first) {
        add_partial(acc[b], partial);
      }
    }
    if (!last) return hold(0, chain);
    const int first_col = part * kBlocks * kBox;
    if (g.copied) {
      keep_gradient(acc, g, first_col);
    } else {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) store_gradient(acc[b], g, first_col + b * kBox);
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ void keep_gradient(const float (&acc)[kBlocks][C::kBlockR / 2], const Gradient& g, int first_col) {
    const bool of_A = g.stride_col == 1;
    pack_boxes<0>(acc[0]);
    if constexpr (kBlocks == 2) pack_boxes<boxes_of(C::kBlockR)>(acc[1]);
    pending_map = &g.result;
    pending_row = of_A ? 0 : first_col;
    pending_col = of_A ? first_col : 0;
    pending_across = of_A;
    hold(kBlocks * boxes_of(C::kBlockR), nullptr);
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
