#pragma once
#include "../simt.h"
namespace fused_lora::ptx {
inline uint32_t shared_address(const void* pointer) { return static_cast<const uint8_t*>(pointer) - simt::shared_memory(); }
inline const char* moved(const char* pointer, int bytes) { return pointer + bytes; }
inline uint32_t moved(uint32_t address, int bytes) { return address + bytes; }
}  // namespace fused_lora::ptx
