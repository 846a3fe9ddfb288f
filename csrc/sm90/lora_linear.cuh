// One pass of the LoRA linear in one launch: a persistent kernel of clusters of two blocks, each block a thread that loads,
// a thread that takes items, and two warpgroups that multiply. docs/hopper.md tells its story.
//
//                  lhs   weight   down   low   up   out
//   forward        x     W        A      xa    B    y       out = lhs W^T + low up^T + bias     all operands K-major
//   backward       dy    W        B      dxa   A    dx      out = lhs W + low up               those on the right MN-major
//                                                           low = scale lhs down^T | down
#pragma once

#include "../ptx/wgmma.cuh"
#include "pipeline.cuh"
#include "schedule.cuh"

namespace fused_lora::sm90 {

// A factor's gradient: sums over tokens of big (M, cols) times low (M, r), in slices that are chained in order.
struct Gradient {
  CUtensorMap big, low;
  void* out;  // element (col, rank) at col * stride_col + rank * stride_rank
  int64_t stride_col, stride_rank;
  int cols;
  float* partial;
  int* chain;
  bool needs_shrink;  // low is made by this launch
};

struct KernelParams {
  CUtensorMap lhs, weight, down, low, up, out;
  Gradient dA, dB;
  Schedule schedule;
  int M, N, K, r;  // out (M, N), sums over K
  void* low_data;
  int64_t low_stride;
  const float* scale;
  const void* bias;
  DType bias_dtype, factor_dtype;
  int* next_item;
  int* exited;
  int* ready;  // for each 128 rows: warpgroups whose part of low is written
  int control_words;
};

template <int kBlockN, int kBlockR>
struct GradientTile {
  static constexpr int kBlocks = kBlockN == 256 && kBlockR <= 128 ? 2 : 1;  // 64 columns each, for one warpgroup
  static constexpr int kCols = kConsumers * kBlocks * kBox;
};

__host__ __device__ constexpr int boxes_of(int size) { return (size + kBox - 1) / kBox; }

// ---- loading -------------------------------------------------------------------------------------------------------------

template <bool kBackward, int kBlockN, int kBlockR>
struct Producer {
  using SharedT = Shared<kBlockN>;
  SharedT& shared;
  const KernelParams& p;
  const int rank;
  Ring<SharedT::kStages> ring;

  // A free stage; `boxes` will land in it.
  __device__ uint32_t begin_step(int boxes) {
    ptx::mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(&shared.full[ring.stage], boxes * kBoxBytes);
    return ptx::shared_address(shared.stages[ring.stage]);
  }

  // Boxes side by side along columns (kMN) or stacked along rows.
  template <bool kMN>
  __device__ void load(uint32_t target, const CUtensorMap* map, int row, int col, int boxes) {
    for (int i = 0; i < boxes; ++i) {
      ptx::tma_load(target + i * kBoxBytes, map, row + (kMN ? 0 : i * kBox), col + (kMN ? i * kBox : 0), &shared.full[ring.stage]);
    }
  }

  // The same boxes for both blocks of the cluster: each loads every other one for both.
  template <bool kMN>
  __device__ void load_for_both(uint32_t target, const CUtensorMap* map, int row, int col, int boxes) {
    for (int i = rank; i < boxes; i += kCluster) {
      ptx::tma_load_multicast(target + i * kBoxBytes, map, row + (kMN ? 0 : i * kBox), col + (kMN ? i * kBox : 0),
                              &shared.full[ring.stage], (1 << kCluster) - 1);
    }
  }

  __device__ void product_steps(const CUtensorMap* lhs, const CUtensorMap* rhs, int row, int col, int size, int rhs_boxes) {
    for (int k = 0; k < size; k += kBox) {
      const uint32_t stage = begin_step(2 + rhs_boxes);
      load<false>(stage, lhs, row, k, 2);
      load_for_both<kBackward>(stage + 2 * kBoxBytes, rhs, kBackward ? k : col, kBackward ? col : k, rhs_boxes);
      ring.advance();
    }
  }

  __device__ void wait_for_low(int row) {
    ptx::flag_wait(p.ready + row / kBlockM, kConsumers);
    ptx::fence_async_global();
  }

  __device__ void shrink(const Item& item) {
    for (int pair = item.row_pair; pair < p.schedule.row_pairs; pair += p.schedule.shrink_items) {
      product_steps(&p.lhs, &p.down, pair * kPairRows + rank * kBlockM, 0, p.K, boxes_of(kBlockR));
    }
  }

  __device__ void tile(const Item& item) {
    const int row = item.row_pair * kPairRows + rank * kBlockM, col = item.col * kBlockN;
    product_steps(&p.lhs, &p.weight, row, col, p.K, kBlockN / kBox);
    wait_for_low(row);
    product_steps(&p.low, &p.up, row, col, p.r, kBlockN / kBox);
  }

  __device__ void gradient(const Item& item) {
    constexpr int kCols = GradientTile<kBlockN, kBlockR>::kCols, kBoxes = kCols / kBox;
    const Gradient& g = item.of_A ? p.dA : p.dB;
    const int col = (item.col * kCluster + rank) * kCols, rows = kGroupPairs * kPairRows;
    const int end = min(p.M, (item.group + 1) * rows);
    for (int row = item.group * rows; row < end; row += kBox) {
      if (g.needs_shrink && row % kBlockM == 0) wait_for_low(row);
      const uint32_t stage = begin_step(kBoxes + boxes_of(kBlockR));
      load<true>(stage, &g.big, row, col, kBoxes);
      load_for_both<true>(stage + kBoxes * kBoxBytes, &g.low, row, 0, boxes_of(kBlockR));
      ring.advance();
    }
  }
};

// ---- multiplying ---------------------------------------------------------------------------------------------------------

// Of an operand in boxes: K-major boxes are stacked along M or N, MN-major ones lie side by side along it.
template <bool kMN>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 1024;
  constexpr uint64_t kLeading = kMN ? kBoxBytes : 16;
  return kSwizzle128 << 62 | (kEightRows >> 4) << 32 | (kLeading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

// Between descriptors of successive 16 of the summed index: 16 elements of a row, or 16 rows.
template <bool kMN>
constexpr uint64_t kSlice = (kMN ? 16 * 128 : 16 * 2) >> 4;
constexpr int kSlices = kBox / 16;

template <typename T>
struct Pack;
template <>
struct Pack<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ Pair pair(float a, float b) { return __floats2bfloat162_rn(a, b); }
  static __device__ __nv_bfloat16 one(float a) { return __float2bfloat16_rn(a); }
};
template <>
struct Pack<__half> {
  using Pair = __half2;
  static __device__ Pair pair(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ __half one(float a) { return __float2half_rn(a); }
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  const auto pair = Pack<T>::pair(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat16: return __half2float(static_cast<const __half*>(data)[i]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
}

template <typename T, bool kBackward, int kBlockN, int kBlockR>
struct Consumer {
  using SharedT = Shared<kBlockN>;
  SharedT& shared;
  const KernelParams& p;
  const int rank;        // of the block in its cluster
  const int warpgroup;   // 0 or 1: which 64 rows of a tile
  Ring<SharedT::kStages> ring;

  __device__ int thread() const { return threadIdx.x % kWarpgroup; }
  __device__ int lane() const { return threadIdx.x % 32; }
  // Where in the 64 rows and in each 8 columns of an accumulator this thread's values lie: rows row() and row() + 8.
  __device__ int row() const { return thread() / 32 * 16 + lane() / 4; }
  __device__ int col() const { return lane() % 4 * 2; }
  __device__ void sync() const { ptx::named_barrier(1 + warpgroup, kWarpgroup); }

  __device__ void release(int stage) {
    if (lane() < kCluster) ptx::mbarrier_arrive_at(&shared.empty[stage], lane());
  }

  // multiply(stage's address, step) for each step: one group of products each, of which one is always in flight.
  template <typename Multiply>
  __device__ __forceinline__ void consume(int steps, Multiply multiply) {
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::mbarrier_wait(&shared.full[ring.stage], ring.phase);
      ptx::wgmma_fence();
      multiply(ptx::shared_address(shared.stages[ring.stage]), step);
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

  // acc = lhs rhs, the operands as product_steps loads them, over `size` and then `more` of the summed index.
  template <int kCount>
  __device__ __forceinline__ void product(float (&acc)[kCount], int size, int more) {
    const int steps = boxes_of(size);
    consume(steps + boxes_of(more), [&](uint32_t stage, int step) {
      const uint64_t lhs = descriptor<false>(stage + warpgroup * kBoxBytes), rhs = descriptor<kBackward>(stage + 2 * kBoxBytes);
      const int left = step < steps ? kBox : more - (step - steps) * kBox;
      multiply_slices<kSlices>(acc, lhs, rhs, left);
    });
  }

  __device__ void shrink(const Item& item) {
    const float scale = *p.scale;
    for (int pair = item.row_pair; pair < p.schedule.row_pairs; pair += p.schedule.shrink_items) {
      float acc[kBlockR / 2] = {};
      product(acc, p.K, 0);
      const int tile_row = pair * kPairRows + rank * kBlockM;
      store_low(acc, scale, tile_row + warpgroup * kBox);
      // What was written is read by copies of other blocks: ordinary writes first, then the flag.
      ptx::fence_async_global();
      __threadfence();
      sync();
      if (thread() == 0) ptx::flag_add_release(p.ready + tile_row / kBlockM, 1);
    }
  }

  __device__ void store_low(const float (&acc)[kBlockR / 2], float scale, int first_row) {
    T* low = static_cast<T*>(p.low_data);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = first_row + row() + 8 * half;
      if (at >= p.M) continue;
#pragma unroll
      for (int j = 0; j < kBlockR / 8; ++j) {
        const int c = 8 * j + col();
        const float a = acc[4 * j + 2 * half] * scale, b = acc[4 * j + 2 * half + 1] * scale;
        if (c + 1 < p.r) {
          *reinterpret_cast<uint32_t*>(low + at * p.low_stride + c) = pack<T>(a, b);
        } else if (c < p.r) {
          low[at * p.low_stride + c] = Pack<T>::one(a);
        }
      }
    }
  }

  __device__ void tile(const Item& item) {
    float acc[kBlockN / 2] = {};
    product(acc, p.K, p.r);
    const int first_col = item.col * kBlockN;
    if (p.bias != nullptr) add_bias(acc, first_col);
    store_out(acc, item.row_pair * kPairRows + rank * kBlockM + warpgroup * kBox, first_col);
  }

  __device__ void add_bias(float (&acc)[kBlockN / 2], int first_col) {
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
      const int c = first_col + 8 * j + col();
      if (c >= p.N) continue;
      const float a = load_as_float(p.bias, p.bias_dtype, c), b = load_as_float(p.bias, p.bias_dtype, c + 1);
      acc[4 * j] += a;
      acc[4 * j + 1] += b;
      acc[4 * j + 2] += a;
      acc[4 * j + 3] += b;
    }
  }

  // 64 columns at a time through two buffers, so that one is written while the other is copied out.
  __device__ void store_out(const float (&acc)[kBlockN / 2], int first_row, int first_col) {
    const int matrix_row = thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (int part = 0; part < kBlockN / kBox; ++part) {
      const uint32_t buffer = ptx::shared_address(shared.out[warpgroup][part % 2]);
      if (thread() == 0) ptx::tma_store_wait_read<1>();
      sync();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* v = acc + part * 32 + j * 8;
        const uint32_t pairs[4] = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
        const int chunk = 2 * j + lane() / 16;
        ptx::stmatrix(buffer + matrix_row * 128 + ((chunk ^ matrix_row % 8) << 4), pairs);
      }
      ptx::fence_async_shared();
      sync();
      if (thread() == 0) {
        ptx::tma_store(&p.out, first_row, first_col + part * kBox, buffer);
        ptx::tma_store_commit();
      }
    }
  }

  __device__ void gradient(const Item& item) {
    using Tile = GradientTile<kBlockN, kBlockR>;
    const Gradient& g = item.of_A ? p.dA : p.dB;
    const int first = item.group * kGroupPairs * kPairRows;
    const int tokens = min(p.M, first + kGroupPairs * kPairRows) - first;
    float acc[Tile::kBlocks][kBlockR / 2] = {};
    consume(boxes_of(tokens), [&](uint32_t stage, int) {
      const uint64_t low = descriptor<true>(stage + Tile::kCols / kBox * kBoxBytes);
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b) {
        const uint64_t big = descriptor<true>(stage + (warpgroup * Tile::kBlocks + b) * kBoxBytes);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          ptx::wgmma<T, true, true>(acc[b], big + s * kSlice<true>, low + s * kSlice<true>);
        }
      }
      ptx::wgmma_commit();
    });
    const int tile = (item.col * kCluster + rank) * kConsumers + warpgroup;
    float4* partial = reinterpret_cast<float4*>(g.partial + int64_t{tile} * Tile::kBlocks * kBox * kBlockR) + thread();
    int* chain = g.chain + tile;
    if (item.group > 0) {
      if (thread() == 0) ptx::flag_wait(chain, item.group);
      sync();
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b) add_partial(acc[b], partial + b * (kBlockR / 8) * kWarpgroup);
    }
    if (item.group + 1 < p.schedule.groups) {
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b) store_partial(acc[b], partial + b * (kBlockR / 8) * kWarpgroup);
      __threadfence();
      sync();
      if (thread() == 0) ptx::flag_add_release(chain, 1);
    } else {
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b) store_gradient(acc[b], g, (tile * Tile::kBlocks + b) * kBox);
    }
  }

  __device__ void add_partial(float (&acc)[kBlockR / 2], const float4* partial) {
#pragma unroll
    for (int i = 0; i < kBlockR / 8; ++i) {
      const float4 v = __ldcg(partial + i * kWarpgroup);
      acc[4 * i] += v.x;
      acc[4 * i + 1] += v.y;
      acc[4 * i + 2] += v.z;
      acc[4 * i + 3] += v.w;
    }
  }

  __device__ void store_partial(const float (&acc)[kBlockR / 2], float4* partial) {
#pragma unroll
    for (int i = 0; i < kBlockR / 8; ++i) {
      __stcg(partial + i * kWarpgroup, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    }
  }

  // The two gradients differ in which index is contiguous: scalar stores, once per launch.
  __device__ void store_gradient(const float (&acc)[kBlockR / 2], const Gradient& g, int first_col) {
    const int c = first_col + row();
    int64_t at = c * g.stride_col + col() * g.stride_rank;
#pragma unroll
    for (int j = 0; j < kBlockR / 8; ++j, at += 8 * g.stride_rank) {
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
      static_cast<T*>(out)[at] = Pack<T>::one(value);
    }
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------------------------

// One thread of a cluster takes items off the list for both blocks.
template <typename SharedT>
__device__ void take_items(SharedT& shared, const KernelParams& p) {
  for (uint32_t phase = 1;; phase ^= 1) {
    ptx::mbarrier_wait(&shared.item_empty, phase);
    const int index = atomicAdd(p.next_item, 1);
    for (int rank = 0; rank < kCluster; ++rank) ptx::publish_at(&shared.item, &shared.item_full, rank, index);
    if (index >= p.schedule.total) return;
  }
}

// The last block to leave sets the counters back to zero for the next launch.
__device__ inline void leave(const KernelParams& p) {
  int last = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(p.exited, 1) == static_cast<int>(gridDim.x) - 1;
  }
  if (__shfl_sync(~0u, last, 0)) {
    for (int i = threadIdx.x; i < p.control_words; i += 32) p.next_item[i] = 0;
  }
}

template <typename T, bool kBackward, int kBlockN, int kBlockR>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    lora_linear_kernel(const __grid_constant__ KernelParams p) {
  using SharedT = Shared<kBlockN>;
  extern __shared__ __align__(1024) uint8_t memory[];
  SharedT& shared = *reinterpret_cast<SharedT*>(memory);
  const int rank = ptx::cluster_rank();
  // A shuffle tells the compiler that it is the same in a warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  if (threadIdx.x == 0) init_barriers(shared);
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warpgroup == 0) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) {
      Producer<kBackward, kBlockN, kBlockR> producer{shared, p, rank};
      for (uint32_t phase = 0;; phase ^= 1) {
        ptx::mbarrier_wait_published(&shared.item_full, phase);
        const Item item = p.schedule.item(*static_cast<volatile int*>(&shared.item));
        if (item.work == Work::kEnd) break;
        if (item.work == Work::kShrink) producer.shrink(item);
        if (item.work == Work::kTile) producer.tile(item);
        if constexpr (kBackward) {
          if (item.work == Work::kGradient) producer.gradient(item);
        }
        // Only now: the next item is taken when this one is nearly done.
        ptx::mbarrier_arrive_at(&shared.item_empty, 0);
      }
    } else if (threadIdx.x == 32 && rank == 0) {
      take_items(shared, p);
    }
    __syncwarp();
  } else {
    ptx::take_registers<232>();
    Consumer<T, kBackward, kBlockN, kBlockR> consumer{shared, p, rank, warpgroup - 1};
    for (uint32_t phase = 0;; phase ^= 1) {
      ptx::mbarrier_wait_published(&shared.item_full, phase);
      const Item item = p.schedule.item(*static_cast<volatile int*>(&shared.item));
      if (item.work == Work::kEnd) break;
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_at(&shared.item_empty, 0);
      if (item.work == Work::kShrink) consumer.shrink(item);
      if (item.work == Work::kTile) consumer.tile(item);
      if constexpr (kBackward) {
        if (item.work == Work::kGradient) consumer.gradient(item);
      }
    }
    ptx::tma_store_wait_read<0>();
  }
  // A block must not leave while its neighbour may still write to it.
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x < 32) leave(p);
}

}  // namespace fused_lora::sm90
