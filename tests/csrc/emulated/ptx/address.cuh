#pragma once
#include "../simt.h"
namespace fused_lora::ptx {
inline uint32_t shared_address(const void* pointer) { return static_cast<const uint8_t*>(pointer) - simt::shared_memory(); }
inline const char* moved(const char* pointer, int bytes) { return pointer + bytes; }
}  // namespace fused_lora::ptx
