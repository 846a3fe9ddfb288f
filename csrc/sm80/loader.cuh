// Copies of steps, far enough ahead of the products, through the segments of one item after another: a segment sums over one
// part's depth, its ranks, or tokens. It waits for nothing while there is something to multiply.
#pragma once

#include <cstddef>

#include "params.cuh"

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

// kGates: tiles are of gate and up.
template <int kStages, bool kBackward, bool kDrops, bool kGates>
struct Loader {
  Shared<kStages>& shared;
  const KernelParams& p;
  List list;
  Copies<kBlockM> left;
  Copies<kBlockN> right;
  int item = -1, segment = 0;  // item: how many were taken before
  int steps = 0;               // until something else happens here
  int rest = 0;                // of the sum, behind those steps
  uint32_t target = 0;         // the stage for the next step
  uint32_t to_left, to_right;  // a thread's first chunks of a step in it
  int ahead = 0;               // steps that are copied and not multiplied
  int to_copy = 0;             // steps of the item
  enum Next { kUnknown, kNumbered, kRead } next = kUnknown;  // what is known of the item after it, or under way
  enum State { kCopies, kCopied, kWaits, kEnds } state = kCopied;  // kCopied: the next step is copied already

  __device__ Loader(Shared<kStages>& shared, const KernelParams& p) : shared(shared), p(p), list(p) {}

  __device__ __forceinline__ uint32_t stages() const { return ptx::shared_address(shared.stages); }
  // From one stage to the next one, in bytes.
  static __device__ __forceinline__ int to_next(uint32_t stage) { return stage == (kStages - 1) * kStageBytes ? (1 - kStages) * kStageBytes : kStageBytes; }
  __device__ Item& at(int number) { return shared.items[number % kSlots]; }

  // One step, while another one is multiplied: where from and where to, early, since an address that changes right after a copy or
  // a load that took it waits for it.
  __device__ __forceinline__ void aim() {
    left.move();
    right.move();
    to_left = ptx::moved(left.to, target);
    to_right = ptx::moved(right.to, target);
    if (state < kWaits) target += to_next(target);
  }
  __device__ __forceinline__ void copy() {
    left.copy(to_left, state == kCopies);
    right.copy(to_right, state == kCopies);
    ptx::async_copies_commit();
  }

  // How many steps may be multiplied before something happens here: there is always one.
  __device__ int free_steps() const { return state >= kWaits ? ahead : steps; }

  // And before it looks ahead.
  __device__ int quiet_steps() const {
    const int until = to_copy - (next == kUnknown ? kAskAt : kReadAt);
    return state < kWaits && next != kRead && until > 0 ? until : kMany;
  }

  // After so many steps, each of which copied one where there was one to copy.
  __device__ void advance(int count) {
    if (state >= kWaits) {
      ahead -= count;
    } else {
      steps -= count;
      to_copy -= count;
    }
  }

  // Goes on to what comes next, and copies as many steps as fit. Waits for others only where nothing is left to multiply.
  __device__ __forceinline__ void serve() {
    bool copied = false;
    while (state != kEnds) {
      look_ahead();
      if (state < kWaits && steps > 0) {
        if (ahead == kStages - 1) break;
        aim();
        copy();
        ++ahead;
        --steps;
        --to_copy;
        copied = true;
      } else if (state == kCopies && rest > 0) {
        copy_rest();
      } else {
        if (state != kWaits && ++segment >= segments()) take_item();
        begin_segment();
        if (state == kWaits && ahead > 0) break;
      }
    }
    if (!copied) return;
    if (ahead == kStages - 1) {
      ptx::async_copies_wait<kStages - 2>();
    } else {
      ptx::async_copies_wait<0>();  // the groups behind a step are as many only where stages are full
    }
    __syncthreads();
  }

  // Asks for the next item, and reads it, when so many steps are left to copy: each takes less than the time of five.
  static constexpr int kAskAt = 16, kReadAt = 8, kMany = 1 << 30;
  __device__ void look_ahead() {
    if (next == kUnknown && to_copy <= kAskAt && item >= 0) {
      list.ask();
      next = kNumbered;
    } else if (next == kNumbered && to_copy <= kReadAt) {
      list.read();
      next = kRead;
    }
  }

  __device__ void take_item() {
    if (next == kUnknown) list.ask();
    if (next != kRead) list.read();
    next = kUnknown;
    segment = 0;
    ++item;
    list.put(&at(item), shared.mark);
    __syncthreads();
    to_copy = steps_of(item);
  }

  // All of an item.
  __device__ int steps_of(int number) {
    const Item& of = at(number);
    const Work work = work_of(number);
    const int part = uniform(of.part);
    if (work == Work::kEnd) return 0;
    if (work == Work::kShrink) return sm80::steps_of(p.part[part].depth);
    if (work != Work::kTile) return sm80::steps_of(uniform(min(p.M - of.row, of.rows)));
    int sum = kGates ? sm80::steps_of(p.part[0].depth) : 0;
    for (int i = first_part(part); i < last_part(part); ++i) {
      sum += (kGates ? 0 : sm80::steps_of(p.part[i].depth)) + sm80::steps_of(p.part[i].r);
    }
    return sum;
  }

  // A tile's parts.
  __device__ int first_part(int part) const { return kBackward || kGates ? 0 : part; }
  __device__ int last_part(int part) const { return kBackward ? p.summed : kGates ? 2 : part + 1; }

  // Where ranks are masked, they come first: their sums are, before others come.
  static constexpr bool kRanksFirst = kBackward && kDrops;

  // Of a tile, the steps before its ranks meet its depth; all of them, or none, where it has no ranks.
  __device__ int turn(int number) {
    const int part = uniform(at(number).part);
    if (kGates) return sm80::steps_of(p.part[0].depth);
    int sum = 0;
    for (int i = first_part(part); i < last_part(part); ++i) sum += sm80::steps_of(kRanksFirst ? p.part[i].r : p.part[i].depth);
    return sum;
  }

  __device__ Work work_of(int number) { return static_cast<Work>(uniform(static_cast<int>(at(number).work))); }

  __device__ int segments() {
    if (item < 0) return 0;
    return work_of(item) != Work::kTile ? 1 : kGates ? 3 : 2 * (kBackward ? p.summed : 1);
  }

  // What it reads may not be there yet.
  __device__ __forceinline__ void begin_segment() {
    const Item& of = at(item);
    const Work work = work_of(item);
    const int row = uniform(of.row), rank = uniform(of.rank), waits = uniform(of.waits);
    int sum = 0;
    bool ready = true;
    if (work == Work::kShrink) {
      const Part& part = p.part[uniform(of.part)];
      sum = part.depth;
      left.begin_k_major(part.lhs, row, p.M, stages());
      begin_right(part.down, 0, rank, part.r);
    } else if (kGates && work == Work::kTile) {
      const bool ranks = segment > 0;
      const int i = ranks ? segment - 1 : 0;
      const Part& part = p.part[i];
      sum = ranks ? part.r : part.depth;
      if (ranks && sum > 0) ready = is_raised(waits + i * p.low_flags, p.row_flags);
      left.begin_k_major(ranks ? part.low : part.lhs, row, p.M, stages());
      // The ranks of one are multiplied with its columns alone.
      right.begin_halves(ranks ? part.up : p.part[right.half()].weight, uniform(of.col), part.cols, stages() + kLeftBytes);
    } else if (work == Work::kTile) {
      const int count = kBackward ? p.summed : 1, i = segment % count;
      const Part& part = p.part[first_part(uniform(of.part)) + i];
      const bool ranks = (segment < count) == kRanksFirst;
      sum = ranks ? part.r : part.depth;
      if (ranks && sum > 0) ready = is_raised(waits + i * p.low_flags, p.row_flags);
      left.begin_k_major(ranks ? part.low : part.lhs, row, p.M, stages());
      begin_right(ranks ? part.up : part.weight, 0, uniform(of.col), part.cols);
    } else if (kBackward && work != Work::kEnd) {
      const Part& part = p.part[uniform(of.part)];
      const Gradient& g = work == Work::kGradientA ? part.dA : part.dB;
      const int rows = uniform(of.rows);
      sum = min(p.M - row, rows);
      if (waits != work::kNone) ready = is_raised(waits, rows / kBlockM * p.row_flags);
      left.begin_mn_major(g.big, row, uniform(of.col), g.cols, stages());
      begin_right(g.low, row, rank, part.r);
    }
    steps = sum / kDepth;
    rest = sum % kDepth;
    state = work == Work::kEnd ? kEnds : ready ? kCopies : kWaits;
  }

  __device__ __forceinline__ void begin_right(const Matrix& matrix, int row, int first, int last) {
    const uint32_t target = stages() + kLeftBytes;
    if constexpr (kBackward) right.begin_mn_major(matrix, row, first, last, target);
    else right.begin_k_major(matrix, first, last, target);
  }

  // The last step of a segment.
  __device__ void copy_rest() {
    if (kBackward && work_of(item) >= Work::kGradientA) left.copy_end_mn_major(target, rest);
    else left.copy_end_k_major(target, rest);
    if constexpr (kBackward) right.copy_end_mn_major(target, rest);
    else right.copy_end_k_major(target, rest);
    steps = 1;
    state = kCopied;
  }

  // For all threads alike.
  __device__ bool is_raised(int first, int count) const {
    bool raised = count == 1 ? ptx::flag_is(p.flags + first, shared.mark) : true;
    for (int i = threadIdx.x; count > 1 && i < count; i += kThreads) raised &= ptx::flag_is(p.flags + first + i, shared.mark);
    return uniform(__syncthreads_and(raised));
  }
};

}  // namespace fused_lora::sm80
