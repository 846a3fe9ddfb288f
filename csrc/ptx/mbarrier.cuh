// mbarriers in shared memory: counted arrivals, and bytes that the copy engine still owes.
#pragma once

#include <cstdint>

#include "address.cuh"

namespace fused_lora::ptx {

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier that lies where `barrier` does, in the shared memory of block `rank` of the cluster. Orders only
// what the block itself sees: ordering the whole cluster's memory costs a fence of the GPU, too much for every step.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Whether it is, now.
__device__ __forceinline__ bool mbarrier_is_over(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Stores to the 32 bytes that lie where `target` does in block `rank` of the cluster; their arrival there completes the phase
// of its barrier, which expects one arrival. Whoever waits for it reads its own block's memory, and gives the place back only
// after what it read was used.
__device__ __forceinline__ void publish_at(void* target, uint64_t* barrier, uint32_t rank, int4 a, int4 b) {
  asm volatile(
      "{\n.reg .b32 remote, at;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [at], 32;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%3, %4, %5, %6}, [at];\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote + 16], {%7, %8, %9, %10}, [at];\n}" ::"r"(
          shared_address(target)),
      "r"(shared_address(barrier)), "r"(rank), "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x),
      "r"(b.y), "r"(b.z), "r"(b.w)
      : "memory");
}

}  // namespace fused_lora::ptx
