// Addresses in shared memory as instructions take them.
#pragma once

#include <cstdint>

namespace fused_lora::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// In a loop: a step further. The compiler would keep two copies of such a pointer, one a step ahead.
__device__ __forceinline__ const char* moved(const char* pointer, int bytes) {
  pointer += bytes;
  asm volatile("" : "+l"(pointer));
  return pointer;
}

__device__ __forceinline__ uint32_t moved(uint32_t address, int bytes) {
  address += bytes;
  asm volatile("" : "+r"(address));
  return address;
}

}  // namespace fused_lora::ptx
