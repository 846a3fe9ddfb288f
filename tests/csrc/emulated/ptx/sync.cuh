#pragma once
#include "../simt.h"
namespace fused_lora::ptx {
inline void flag_raise(int* flag, int mark) { *flag = mark; }
inline bool flag_is(const int* flag, int mark) { return *flag == mark; }
inline void flag_wait(const int* flag, int mark) {
  while (!flag_is(flag, mark)) simt::let_others();
}
inline void store_shared(uint32_t address, uint4 v) { std::memcpy(simt::shared_memory() + address, &v, 16); }
inline void store_shared(uint32_t address, uint32_t v) { std::memcpy(simt::shared_memory() + address, &v, 4); }
inline void store_global(uint4* address, uint4 v) { *address = v; }
inline uint4 load_shared(uint32_t address) {
  uint4 v;
  std::memcpy(&v, simt::shared_memory() + address, 16);
  return v;
}
inline float4 load_l2(const float4* address) { return *address; }
inline uint16_t load_shared_16(uint32_t address) {
  uint16_t v;
  std::memcpy(&v, simt::shared_memory() + address, 2);
  return v;
}
}  // namespace fused_lora::ptx
