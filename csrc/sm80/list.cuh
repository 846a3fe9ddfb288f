// The list of work as a block reads it: items that are taken in turn, and what all of its threads know of them.
#pragma once

#include <cstddef>
#include <type_traits>

#include "runs.cuh"

namespace fused_lora::sm80 {

// What all threads know alike, such that the compiler knows it too and keeps it, and what follows from it, in uniform registers.
__device__ __forceinline__ int uniform(int number) { return static_cast<int>(__reduce_or_sync(~0u, number)); }

constexpr int kSlots = 8;  // items that are known at once: more than stages, since an item has a step at least

template <int kStages>
struct Shared {
  uint8_t stages[kStages][kStageBytes];
  Item items[kSlots];
  int mark;  // the launch's
};

static_assert(kSlots >= kMostStages + 2, "one that is multiplied, and those of all stages");

// Where rows have adapters of their own.
template <int kStages>
struct SegmentedShared : Shared<kStages> {
  StepsOfItem steps[kSlots];
  Run run;
  WindowOfItem window;
};

// The next item of the list, by the first warp: its number is asked for, then its words are read, each some steps before it is needed.
// No earlier: whoever has a number keeps others waiting for what that item raises.
struct List {
  const KernelParams& p;
  int number = 0;  // lane 0's
  int word = 0;    // one of each of the first eight lanes

  __device__ explicit List(const KernelParams& p) : p(p) {}

  // The first ones are taken so too, since nobody knows which blocks run.
  __device__ void ask() {
    if (threadIdx.x == 0) number = atomicAdd(&p.counters->taken, 1);
  }
  __device__ void read() {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x, own = __shfl_sync(~0u, number, 0);
    word = lane == 0 ? static_cast<int>(Work::kEnd) : 0;
    if (lane < 8 && own < p.items) word = __ldg(reinterpret_cast<const int*>(p.list + own) + lane);
  }
  // Where others read it, behind a barrier.
  __device__ void put(Item* slot, int mark) const {
    if (threadIdx.x < 8) reinterpret_cast<int*>(slot)[threadIdx.x] = threadIdx.x == offsetof(Item, mark) / 4 ? mark : word;
  }
};

// What decides how an item goes on.
struct Head {
  Work work;
  int bits, part;

  __device__ explicit Head(const Item& item) {
    const int word = uniform(*reinterpret_cast<const int*>(&item));
    work = static_cast<Work>(word & 0xFF);
    bits = word >> 8 & 0xFF;
    part = word >> 16;
  }

  __device__ bool is_half() const { return bits & work::kHalf; }
  __device__ bool is_first() const { return bits & work::kFirst; }
  __device__ bool has_ranks() const { return !is_half() || !is_first(); }
};

}  // namespace fused_lora::sm80
