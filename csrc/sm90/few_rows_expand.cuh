// y = gain (x W^T + low B^T) + bias of few rows, 64 columns in a cluster whose blocks share the depth.
#pragma once

#include "../columns.cuh"
#include "../ptx/tma.cuh"
#include "few_rows.cuh"

namespace fused_lora::sm90 {

constexpr int kColumns = kBox;  // of y, for a cluster
constexpr int kQuad = 4;        // of them, for a thread at once
// In this order: those that multiply, those that finish, and a warp that loads.
constexpr int kFinishingThreads = 2 * kWarpgroup, kLoader = (kWarpgroup + kFinishingThreads) / 32, kExpandThreads = 32 * (kLoader + 1);

// A block's memory. kRows: M, filled up. A launch says how many stages there are.
template <int kRows>
struct ExpandShared {
  static constexpr int kStageBytes = (kColumns + kRows) * kBox * 2;
  static constexpr int kStride = kColumns + 4;  // of sums: 4 more, so that a warp's stores meet all banks
  using Sums = float[kRows][kStride];

  uint8_t* memory;
  const int stages;

  static constexpr int stages_in(int bytes) { return (bytes - 1024) / kStageBytes; }
  static constexpr int bytes(int stages) { return stages * (kStageBytes + 2 * static_cast<int>(sizeof(uint64_t))); }

  __device__ uint32_t stage(int i) const { return ptx::shared_address(memory) + i * kStageBytes; }
  __device__ uint64_t* full(int i) const { return reinterpret_cast<uint64_t*>(memory + stages * kStageBytes) + i; }
  __device__ uint64_t* empty(int i) const { return full(stages + i); }
  __device__ Sums& sums() const { return *reinterpret_cast<Sums*>(memory); }  // once all stages are read

  struct Turn {
    const int stages;
    int stage = 0;
    uint32_t phase = 0;

    __device__ void advance() {
      if (++stage == stages) stage = 0, phase ^= 1;
    }
  };
  __device__ Turn first_turn() const { return {stages}; }
};

// Boxes of the depth that are this block's.
struct Share {
  int begin, end;

  __device__ Share(int K, int rank, int shares) : begin(boxes_of(K) * rank / shares), end(boxes_of(K) * (rank + 1) / shares) {}
};

template <int kRows>
__device__ void load_share(const ExpandShared<kRows>& shared, const FewRows& p, const Share& share, int first_column) {
  auto turn = shared.first_turn();
  for (int box = share.begin; box < share.end; ++box, turn.advance()) {
    if (box >= share.begin + shared.stages) ptx::mbarrier_wait(shared.empty(turn.stage), turn.phase ^ 1);
    uint64_t* full = shared.full(turn.stage);
    const uint32_t stage = shared.stage(turn.stage);
    ptx::mbarrier_arrive_expect_tx(full, shared.kStageBytes);
    ptx::tma_load_once(stage, &p.weight_map, first_column, box * kBox, full);
    ptx::tma_load(stage + kBoxBytes, &p.x_map, 0, box * kBox, full);
  }
}

// This block's sums, in its memory.
template <typename T, int kRows>
__device__ void multiply_share(const ExpandShared<kRows>& shared, const Share& share) {
  float acc[kRows / 2] = {};
  auto turn = shared.first_turn();
  int in_flight = -1;
  for (int box = share.begin; box < share.end; ++box, turn.advance()) {
    ptx::mbarrier_wait(shared.full(turn.stage), turn.phase);
    const uint32_t stage = shared.stage(turn.stage);
    const uint64_t weight = descriptor<false>(stage), x = descriptor<false>(stage + kBoxBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSlices; ++s) ptx::wgmma<T, false, false>(acc, weight + s * kSlice<false>, x + s * kSlice<false>);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (in_flight >= 0 && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.empty(in_flight));
    in_flight = turn.stage;
  }
  ptx::wgmma_wait<0>();
  ptx::named_barrier(1, kWarpgroup);  // nobody reads stages any more
  const int column = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, row = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) shared.sums()[i / 4 * 8 + row + i % 2][column + i / 2 % 2 * 8] = acc[i];
}

struct Quad {
  float at[kQuad] = {};

  __device__ __forceinline__ void add(const float4& other) {
    at[0] += other.x;
    at[1] += other.y;
    at[2] += other.z;
    at[3] += other.w;
  }

  template <typename T>
  __device__ __forceinline__ void add(float by, const uint2& pairs) {
    const float2 low = unpack<T>(pairs.x), high = unpack<T>(pairs.y);
    at[0] = fmaf(by, low.x, at[0]);
    at[1] = fmaf(by, low.y, at[1]);
    at[2] = fmaf(by, high.x, at[2]);
    at[3] = fmaf(by, high.y, at[3]);
  }
};

// low up of four columns, by the next 8 ranks.
template <typename T>
__device__ __forceinline__ void add_ranks_of_slab(Quad& sum, const uint4& low, const uint16_t* up, int64_t up_stride) {
  const uint32_t pairs[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 by = unpack<T>(pairs[i]);
    sum.add<T>(by.x, __ldg(reinterpret_cast<const uint2*>(up + 2 * i * up_stride)));
    sum.add<T>(by.y, __ldg(reinterpret_cast<const uint2*>(up + (2 * i + 1) * up_stride)));
  }
}

// Those that finish a block's part of the columns, a few quads each thread.
template <typename T, int kRows, int kShares>
struct Finisher {
  static constexpr int kRowQuads = kColumns / kQuad / kShares, kQuads = ceil_div(kRows * kRowQuads, kFinishingThreads);

  const FewRows& p;
  const int first_column, rank;  // of the cluster's columns; of the block in the cluster
  Quad sums[kQuads];

  __device__ int item(int i) const { return threadIdx.x - kWarpgroup + i * kFinishingThreads; }
  __device__ int row(int i) const { return item(i) / kRowQuads; }
  __device__ int own_column(int i) const { return (rank * kRowQuads + item(i) % kRowQuads) * kQuad; }
  __device__ int column(int i) const { return first_column + own_column(i); }
  __device__ bool exists(int i) const { return row(i) < p.M && column(i) < p.N; }

  // Into L2 what rows' own B has for this cluster and its neighbours, in pieces as long as memory likes to read.
  __device__ void call_for_up() const {
    constexpr int kCalled = 4 * kColumns, kWarps = kFinishingThreads / 32;
    if (!p.segmented() || first_column % kCalled != 0) return;
    const int bytes = min(kCalled, p.N - first_column) * 2;
    for (int row = rank * kWarps + threadIdx.x / 32 - kWarpgroup / 32; row < p.M; row += kShares * kWarps) {
      for (int level = 0; level < p.levels(); ++level) {
        const Adapter own(p, level, row);
        for (int j = threadIdx.x % 32; j < own.ranks; j += 32) ptx::prefetch(p.up + (own.rank + j) * p.up_stride + first_column, bytes);
      }
    }
  }

  __device__ __forceinline__ void add_update(const Adapter& own, int i) {
    Quad update;
#pragma unroll 2
    for (int j = 0; j < own.ranks; j += kChunk) {
      const uint4 low = __ldcg(reinterpret_cast<const uint4*>(own.low(p, row(i), j)));
      if (p.segmented()) {
        add_ranks_of_slab<T>(update, low, p.up + (own.rank + j) * p.up_stride + column(i), p.up_stride);
      } else {
#pragma unroll
        for (int c = 0; c < kQuad; ++c) update.at[c] = add_dot<T>(update.at[c], low, load_chunk(p.up + (column(i) + c) * p.up_stride + j));
      }
    }
    const float more = kHasRoom<T> && own.ranks > 0 ? room(own.scale) : 1;
#pragma unroll
    for (int c = 0; c < kQuad; ++c) sums[i].at[c] = fmaf(more, update.at[c], sums[i].at[c]);
  }

  // xa B^T. What it takes to find it is read before it is there.
  __device__ void update() {
    Adapter own[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (exists(i)) own[i] = Adapter(p, 0, row(i));
    }
    call_for_up();
    ptx::await_last_launch();
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!exists(i)) continue;
      add_update(own[i], i);
      for (int level = 1; level < p.levels(); ++level) add_update(Adapter(p, level, row(i)), i);
    }
  }

  __device__ void finish(const ExpandShared<kRows>& shared) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!exists(i)) continue;
      Quad& sum = sums[i];
      float4 parts[kShares];
#pragma unroll
      for (int other = 0; other < kShares; ++other) parts[other] = ptx::load_shared_at(&shared.sums()[row(i)][own_column(i)], other);
#pragma unroll
      for (int other = 0; other < kShares; ++other) sum.add(parts[other]);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) Column::of(p, column(i) + c).finish(sum.at[c]);
      const uint2 rounded{pack<T>(sum.at[0], sum.at[1]), pack<T>(sum.at[2], sum.at[3])};
      *reinterpret_cast<uint2*>(p.y + static_cast<int64_t>(row(i)) * p.N + column(i)) = rounded;
    }
  }
};

template <typename T, int kRows, int kShares>
__global__ void __launch_bounds__(kExpandThreads, 2) expand_few_rows_kernel(const __grid_constant__ FewRows p, int stages) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  const ExpandShared<kRows> shared{memory, stages};
  const int rank = ptx::cluster_rank(), first_column = static_cast<int>(blockIdx.x) / kShares * kColumns;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::mbarrier_init(shared.full(stage), 1);
      ptx::mbarrier_init(shared.empty(stage), kWarpgroup / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const Share share(p.K, rank, kShares);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  Finisher<T, kRows, kShares> finisher{p, first_column, rank};
  if (warp < kWarpgroup / 32) {
    multiply_share<T>(shared, share);
  } else if (warp < kLoader) {
    if (p.r > 0) finisher.update();
  } else if (threadIdx.x == kLoader * 32) {
    load_share(shared, p, share, first_column);
  }
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (warp >= kWarpgroup / 32 && warp < kLoader) finisher.finish(shared);
  __syncwarp();
  ptx::cluster_arrive();  // others still read this block's memory
  ptx::cluster_wait();
#endif
}

}  // namespace fused_lora::sm90
