// Copies of 16 bytes from global to shared memory that run while a thread goes on, in groups in the order of their commits.
#pragma once

#include <cstdint>

namespace fused_lora::ptx {

__device__ __forceinline__ void async_copy_16(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// To kOffset bytes behind the target, where it is valid; its 128 bytes come to L2 together. A predicate here, since a branch around the copy would keep the compiler
// from moving it among products.
template <int kOffset>
__device__ __forceinline__ void async_copy_16_if(bool valid, uint32_t target, const void* source) {
  asm volatile(
      "{\n.reg .pred valid;\n"
      "setp.ne.b32 valid, %0, 0;\n"
      "@valid cp.async.cg.shared.global.L2::128B [%1 + %3], [%2], 16;\n}" ::"r"(static_cast<int>(valid)),
      "r"(target), "l"(source), "n"(kOffset)
      : "memory");
}

// Zeros where it is not valid; the source is not read then.
__device__ __forceinline__ void async_copy_16_or_zeros(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void async_copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kGroups` of this thread's committed groups are under way.
template <int kGroups>
__device__ __forceinline__ void async_copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace fused_lora::ptx
