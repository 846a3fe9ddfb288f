// One pass of the LoRA linear in one launch: a persistent kernel of clusters of two blocks, each with a thread that loads, two
// warpgroups that multiply and two warps that finish what the copy engine cannot store, and one thread that takes work items for
// both blocks. docs/hopper.md tells its story.
#pragma once

#include "consumer.cuh"
#include "producer.cuh"

namespace fused_lora::sm90 {

// An item in 16-byte words, as it is read and published.
struct ItemWords {
  int4 first, second;

  __device__ Item item() const {
    return {static_cast<Work>(first.x & 0xFF), static_cast<uint8_t>(first.x >> 8), static_cast<int16_t>(first.x >> 16), first.y,
            first.z, first.w, second.x, second.y, second.z, {second.w}};
  }
  __device__ bool is_end() const { return (first.x & 0xFF) == static_cast<int>(Work::kEnd); }
};

// The list's item of this number, with the launch's mark; its end behind the last one.
__device__ inline ItemWords read_item(const KernelParams& p, int number, int mark) {
  ItemWords read{{static_cast<int>(Work::kEnd)}, {}};
  if (number < p.items) {
    const int4* from = reinterpret_cast<const int4*>(p.list + number);
    read = {__ldg(from), __ldg(from + 1)};
  }
  read.second.z = mark;
  return read;
}

// The next one that nobody has taken: all are taken so, since nobody knows which clusters run.
__device__ inline ItemWords take_item(const KernelParams& p, int mark) {
  return read_item(p, atomicAdd(&p.counters->taken, 1), mark);
}

// One thread of a cluster takes items off the list for both blocks, after the first `item`.
template <typename C>
__device__ void take_items(Shared<C>& shared, const KernelParams& p, ItemWords item) {
  const int mark = item.second.z;
  for (uint32_t phase = 0;; phase ^= 1) {
    for (int rank = 0; rank < kCluster; ++rank) ptx::publish_at(&shared.item, &shared.item_full, rank, item.first, item.second);
    if (item.is_end()) return;
    ptx::mbarrier_wait(&shared.item_empty, phase);
    item = take_item(p, mark);
  }
}

template <typename C>
__device__ Item await_item(Shared<C>& shared, uint32_t phase) {
  ptx::mbarrier_wait(&shared.item_full, phase);
  const int4* words = reinterpret_cast<const int4*>(&shared.item);
  return ItemWords{words[0], words[1]}.item();
}

// Of the block's producer, which has seen the list's end. The last one makes the counters what the next launch needs.
__device__ inline void leave(const KernelParams& p, int mark) {
  __threadfence();
  if (atomicAdd(&p.counters->exited, 1) + 1 == static_cast<int>(gridDim.x)) *p.counters = {mark};
}

template <bool kBackward>
__device__ void prefetch_maps(const KernelParams& p) {
  for (int i = 0; i < p.parts; ++i) {
    const Part& part = p.part[i];
    for (const CUtensorMap* map : {&part.lhs, &part.weight, &part.down, &part.low, &part.up, &part.out}) ptx::tma_prefetch(map);
    if constexpr (kBackward) {
      for (const CUtensorMap* map : {&part.dA.big, &part.dB.low}) ptx::tma_prefetch(map);
    }
  }
}

// The extension is compiled for other targets too, for which there are no clusters and the kernel is empty.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FUSED_LORA_CLUSTER __cluster_dims__(kCluster)
#else
#define FUSED_LORA_CLUSTER
#endif

template <typename C, typename T, bool kBackward, bool kDrops>
__global__ void FUSED_LORA_CLUSTER __launch_bounds__(kThreads, 1) lora_linear_kernel(const __grid_constant__ KernelParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
  const int rank = ptx::cluster_rank();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);  // which tells the compiler that it is a warp's
  if (threadIdx.x == 0) init_barriers(shared);
  if (threadIdx.x == kWarpgroup - 1) prefetch_maps<kBackward>(p);
  const bool takes_items = rank == 0 && threadIdx.x == 32;
  ItemWords first_item;
  if (takes_items) {  // while the barriers are made
    ptx::prefetch(p.list + blockIdx.x / kCluster);  // one cluster's is another one's
    first_item = take_item(p, p.counters->launches + 1);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (p.ring.pieces > 0) Dequantiser<T, kBackward, C::kGates>(p).fill();

  if (warpgroup == 0) {
    ptx::give_registers<C::kLoadRegisters>();
    if (threadIdx.x == 0) {
      Producer<C, kBackward, kDrops> producer{shared, p, rank};
      Item item = await_item(shared, 0);
      shared.mark = item.mark;  // for the consumers, who see it when they see a stage
      for (uint32_t phase = 1; item.work != Work::kEnd; phase ^= 1) {
        producer.run(item);
        item = await_item(shared, phase);
      }
      if (p.ring.pieces > 0) ptx::mbarrier_wait(&shared.dequantised, 0);
      leave(p, item.mark);
    } else if (takes_items) {
      take_items(shared, p, first_item);
    } else if (threadIdx.x >= kWarpgroup - kFinishThreads) {
      run_finisher<C, T, kBackward>(shared, p);
    }
  } else {
    ptx::take_registers<C::kMultiplyRegisters>();
    Consumer<C, T, kBackward, kDrops> consumer{shared, p, rank, {warpgroup - 1}};
    for (uint32_t phase = 0;; phase ^= 1) {
      const Item item = await_item(shared, phase);
      if (item.work == Work::kEnd) break;
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_at(&shared.item_empty, 0);
      consumer.run(item);
    }
    consumer.outbox.finish();
  }
  // A block must not leave while its neighbour may still write to it. Nothing comes between the two: compute-sanitizer's tools
  // hang where memory is accessed there.
  __syncwarp();
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
#endif
}

}  // namespace fused_lora::sm90
