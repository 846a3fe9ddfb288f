// Blocks of threads on the CPU: each thread is a fiber that goes on until it must wait for others. A copy of cp.async arrives at
// once or as late as it may, as drawn: the one finds what is written before others have read, the other what is read too early.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define __noinline__
using std::max;
using std::min;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 18;

struct Copy {
  uint32_t target;
  uint8_t bytes[16];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool ended = false;
  std::vector<Copy> open;                // copies of no group yet
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
};

// Threads that meet: the last to come acts for all.
struct Meeting {
  int members, here = 0;
  long round = 0;
  void meet(const std::function<void()>& act);
};

// What the lanes of a warp show each other.
struct Warp {
  Meeting meeting{kWarp};
  uint32_t words[kWarp], kept[kWarp];
  float lhs[16][16], rhs[16][8];
};

struct Block {
  int index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting all;
  std::vector<uint8_t> memory;  // shared
  bool vote = true, outcome = true;
  Block(int index, int count, size_t bytes) : index(index), threads(count), warps(count / kWarp), all{count}, memory(bytes + 128, 0xFF) {}
};

inline ucontext_t scheduler;
inline std::mt19937 chance;
inline Block* block;
inline int thread_index, blocks;

inline uint8_t* shared_memory() {
  uint8_t* memory = block->memory.data();
  return memory + (128 - reinterpret_cast<uintptr_t>(memory) % 128) % 128;
}
inline Thread& thread() { return block->threads[thread_index]; }
inline int lane() { return thread_index % kWarp; }
inline Warp& warp() { return block->warps[thread_index / kWarp]; }

inline void let_others() { swapcontext(&thread().context, &scheduler); }

inline void Meeting::meet(const std::function<void()>& act) {
  const long own = round;
  if (++here == members) {
    act();
    here = 0;
    ++round;
    return;
  }
  while (round == own) let_others();
}

inline void meet_warp(const std::function<void()>& act = [] {}) { warp().meeting.meet(act); }

inline std::function<void()>* body;
inline void start() {
  (*body)();
  thread().ended = true;
  let_others();
}

// Whose turn is next is drawn among the threads of all blocks; the last block begins when the others have ended, as where a device
// has no room for it. False: nobody has come to an end for long.
inline bool run(int block_count, int threads, size_t bytes, std::function<void()> kernel) {
  std::vector<Block> all;
  std::vector<std::pair<int, int>> order;
  for (int i = 0; i < block_count; ++i) all.emplace_back(i, threads, bytes);
  body = &kernel;
  blocks = block_count;
  for (Block& own : all) {
    for (Thread& thread : own.threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      makecontext(&thread.context, start, 0);
      order.emplace_back(own.index, &thread - own.threads.data());
    }
  }
  chance.seed(threads);  // each launch alone decides how it goes
  for (long rounds = 0; !order.empty(); ++rounds) {
    if (rounds > 2000000) return false;
    std::shuffle(order.begin(), order.end(), chance);
    for (const auto& [index, number] : order) {
      if (index > 0 && index + 1 == block_count && order.size() > static_cast<size_t>(threads)) continue;
      block = &all[index];
      thread_index = number;
      swapcontext(&scheduler, &thread().context);
    }
    std::erase_if(order, [&](const auto& next) { return all[next.first].threads[next.second].ended; });
  }
  return true;
}

}  // namespace simt

template <int* kValue>
struct Index {
  operator int() const { return *kValue; }
};
inline struct {
  Index<&simt::thread_index> x;
} threadIdx;
inline struct {
  Index<&simt::blocks> x;
} gridDim;
struct BlockIndex {
  operator int() const { return simt::block->index; }
};
inline struct {
  BlockIndex x;
} blockIdx;

inline void __syncthreads() {
  simt::block->all.meet([] {});
}
inline void __syncwarp() { simt::meet_warp(); }
inline bool __syncthreads_and(bool value) {
  simt::block->vote &= value;
  simt::block->all.meet([] {
    simt::block->outcome = simt::block->vote;
    simt::block->vote = true;
  });
  return simt::block->outcome;
}
template <typename T>
T exchange(T value, int from) {
  simt::Warp& warp = simt::warp();
  std::memcpy(&warp.words[simt::lane()], &value, 4);
  simt::meet_warp([&] { std::copy_n(warp.words, simt::kWarp, warp.kept); });
  std::memcpy(&value, &warp.kept[from], 4);
  return value;
}
template <typename T>
T __shfl_sync(uint32_t, T value, int from) {
  return exchange(value, from);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return exchange(value, simt::lane() ^ mask);
}
inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  simt::Warp& warp = simt::warp();
  std::memcpy(&warp.words[simt::lane()], &value, 4);
  simt::meet_warp([&] { std::copy_n(warp.words, simt::kWarp, warp.kept); });
  uint32_t all = 0;
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    uint32_t own;
    std::memcpy(&own, &warp.kept[lane], 4);
    all |= own;
  }
  return all;
}
inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) { simt::let_others(); }
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
void __stcg(T* at, T value) {
  *at = value;
}
