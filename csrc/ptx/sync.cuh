// Registers, barriers and flags, by which threads, warpgroups, clusters and the grid agree; and single accesses to memory.
#pragma once

#include <cstdint>

namespace fused_lora::ptx {

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The launch behind this one may begin, if it was told to be beside it.
__device__ __forceinline__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Until the launch before this one has ended, and what it wrote is seen.
__device__ __forceinline__ void await_last_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

// Orders no memory.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A barrier of `threads` threads among those of the block; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void flag_raise(int* flag, int mark) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(mark) : "memory");
}

// Of who has written nothing that others wait for: it costs no fence.
__device__ __forceinline__ void flag_raise_unordered(int* flag, int mark) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(mark) : "memory");
}

__device__ __forceinline__ uint32_t clock() {
  uint32_t cycles;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(cycles));
  return cycles;
}

// Into the L2 cache.
__device__ __forceinline__ void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// So many bytes, a multiple of 16, as are the address's.
__device__ __forceinline__ void prefetch(const void* address, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool flag_is(const int* flag, int mark) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value == mark;
}

// Until the flag has this mark.
__device__ __forceinline__ void flag_wait(const int* flag, int mark) {
  while (!flag_is(flag, mark)) __nanosleep(64);
}

// Of two flags side by side, the first at an even place.
__device__ __forceinline__ void flag_pair_wait(const int* flags, int mark) {
  for (long long value;; __nanosleep(64)) {
    asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(flags) : "memory");
    if (static_cast<int>(value) == mark && static_cast<int>(value >> 32) == mark) return;
  }
}

// Four flags at once, in the order of the source but of no other memory.
__device__ __forceinline__ int4 load_flags(const int* flags) {
  int4 v;
  asm volatile("ld.relaxed.gpu.global.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(flags) : "memory");
  return v;
}

// The same of two.
__device__ __forceinline__ int2 load_flag_pair(const int* flags) {
  int2 v;
  asm volatile("ld.relaxed.gpu.global.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(flags) : "memory");
  return v;
}

// Whether `count` flags have this mark; the first one's place is a multiple of four. All are asked for before one is looked at.
__device__ __forceinline__ bool flags_are(const int* flags, int count, int mark) {
  int others = 0;
#pragma unroll 8
  for (int i = 0; i < count; i += 4) {
    const int4 v = load_flags(flags + i);
    others |= (v.x ^ mark) | (i + 1 < count ? v.y ^ mark : 0) | (i + 2 < count ? v.z ^ mark : 0) | (i + 3 < count ? v.w ^ mark : 0);
  }
  return others == 0;
}

// What was written before the flags were raised that were seen is seen from here on.
__device__ __forceinline__ void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Adds at the L2 cache, without an answer.
__device__ __forceinline__ void add_float4(float4* target, float4 value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
}

__device__ __forceinline__ void add_float(float* target, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(target), "f"(value) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// What lies where `source` does in block `rank` of the cluster.
__device__ __forceinline__ float4 load_shared_at(const void* source, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(source))), "r"(rank)
      : "memory");
  return v;
}

__device__ __forceinline__ int load_shared_32(uint32_t address) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint16_t load_shared_16(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// 16 bytes past the L1 cache, in the order of the source.
__device__ __forceinline__ float4 load_l2(const float4* address) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
  return v;
}

// 16 bytes that nobody writes meanwhile, in the order of the source, so that several are asked for before one is used.
__device__ __forceinline__ uint4 load_now(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// What createpolicy.fractional.L2::evict_first makes for all lines.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;

// As load_now, of what nobody reads again but at once: it leaves the L2 cache before all else, so that little else must leave for it.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address), "l"(kEvictFirst));
  return v;
}

// 16 bytes to memory at once, which the compiler takes apart where it has taken the uint4 apart.
__device__ __forceinline__ void store_global(uint4* address, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Four 8 x 8 matrices of 16-bit pairs to shared memory; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix(uint32_t row_address, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(pairs[0]),
               "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// The same with each matrix transposed.
__device__ __forceinline__ void stmatrix_transposed(uint32_t row_address, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(pairs[0]),
               "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

}  // namespace fused_lora::ptx
