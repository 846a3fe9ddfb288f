// A block of threads on the CPU: each is a fiber, and whoever must wait for others lets them go on. Copies of cp.async arrive
// as late as they may.
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
#include <vector>

#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
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

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  ucontext_t scheduler;
  int current = 0;
  bool vote = true, outcome = true;
  explicit Block(int count) : threads(count), warps(count / kWarp, Meeting{kWarp}), all{count} {}
};

inline Block* block;
inline uint8_t* shared_memory;  // of the block

inline void let_others() { swapcontext(&block->threads[block->current].context, &block->scheduler); }

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

inline int lane() { return block->current % kWarp; }
inline void meet_warp(const std::function<void()>& act) { block->warps[block->current / kWarp].meet(act); }

inline std::function<void()>* body;
inline void start() {
  (*body)();
  block->threads[block->current].ended = true;
  let_others();
}

inline void run(int threads, std::function<void()> kernel) {
  Block own(threads);
  block = &own;
  body = &kernel;
  for (Thread& thread : own.threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, start, 0);
  }
  for (long idle = 0; !std::all_of(own.threads.begin(), own.threads.end(), [](const Thread& t) { return t.ended; }); ++idle) {
    if (idle > 20000000) {
      std::fprintf(stderr, "a block hangs\n");
      std::abort();
    }
    for (own.current = 0; own.current < threads; ++own.current) {
      if (!own.threads[own.current].ended) swapcontext(&own.scheduler, &own.threads[own.current].context);
    }
  }
}

}  // namespace simt

struct Index {
  operator int() const { return simt::block->current; }
};
struct ThreadIdx {
  Index x;
};
inline ThreadIdx threadIdx;
inline struct {
  int x = 0;
} blockIdx;
inline struct {
  int x = 1;
} gridDim;

inline void __syncthreads() {
  simt::block->all.meet([] {});
}
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
  static uint32_t words[8][simt::kWarp], kept[8][simt::kWarp];
  const int warp = simt::block->current / simt::kWarp;
  words[warp][simt::lane()] = reinterpret_cast<uint32_t&>(value);
  simt::meet_warp([warp] { std::copy_n(words[warp], simt::kWarp, kept[warp]); });
  T result;
  reinterpret_cast<uint32_t&>(result) = kept[warp][from];
  return result;
}
template <typename T>
T __shfl_sync(uint32_t, T value, int from) {
  return exchange(value, from);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return exchange(value, simt::lane() ^ mask);
}
inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
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
