// Copies read at once, and arrive then or when somebody waits for them.
#pragma once
#include "../simt.h"
namespace fused_lora::ptx {
inline void arrive(const simt::Copy& copy) { std::memcpy(simt::shared_memory() + copy.target, copy.bytes, sizeof(copy.bytes)); }
inline void async_copy_16_or_zeros(uint32_t target, const void* source, bool valid) {
  simt::Copy copy{target, {}};
  if (valid) std::memcpy(copy.bytes, source, 16);
  if (simt::chance() % 2) arrive(copy);
  else simt::thread().open.push_back(copy);
}
template <int kOffset>
void async_copy_16_if(bool valid, uint32_t target, const void* source) {
  if (valid) async_copy_16_or_zeros(target + kOffset, source, true);
}
inline void async_copies_commit() {
  simt::Thread& thread = simt::thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int kGroups>
void async_copies_wait() {
  auto& groups = simt::thread().groups;
  while (groups.size() > kGroups) {
    for (const simt::Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}
}  // namespace fused_lora::ptx
