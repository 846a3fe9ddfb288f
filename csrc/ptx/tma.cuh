// The copy engine: tiles of a tensor map into shared memory and back.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "mbarrier.cuh"
#include "sync.cuh"

namespace fused_lora::ptx {

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (row, col), zeros outside the tensor, to `target`; its bytes count down at `barrier`.
__device__ __forceinline__ void tma_load(uint32_t target, const CUtensorMap* map, int row, int col, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same of what nobody reads again: it leaves the L2 cache before all else.
__device__ __forceinline__ void tma_load_once(uint32_t target, const CUtensorMap* map, int row, int col, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
          target),
      "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier)), "l"(kEvictFirst)
      : "memory");
}

// The same to every block of the cluster whose bit is set, at the same place in each, counted at each one's own barrier.
__device__ __forceinline__ void tma_load_multicast(uint32_t target, const CUtensorMap* map, int row, int col, uint64_t* barrier,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// The box in shared memory to (row, col); what lies outside the tensor is not written.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, int row, int col, uint32_t source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(col), "r"(row),
               "r"(source)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most `kGroups` of this thread's committed stores still read shared memory.
template <int kGroups>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// Until what this thread's committed stores wrote is there for all.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary writes to shared memory before it are seen by copies after it.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same of global memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace fused_lora::ptx
