// Copies of steps, far enough ahead of the products, through the segments of one item after another: a segment sums over one
// part's depth, its ranks, or tokens. It waits for nothing while there is something to multiply.
#pragma once

#include "list.cuh"

namespace fused_lora::sm80 {

// kGates: tiles are of gate and up. kSegmented: rows have adapters of their own, and segments are an item's runs.
template <int kStages, bool kBackward, bool kGates, bool kSegmented>
struct Loader {
  using Memory = std::conditional_t<kSegmented, SegmentedShared<kStages>, Shared<kStages>>;

  Memory& shared;
  const KernelParams& p;
  List list;
  Copies<kBlockM> left;
  Copies<kBlockN> right;
  int item = -1, segment = 0;  // item: how many were taken before
  int steps = 0;               // until something else happens here
  int rest = 0;                // of the sum, behind those steps; or kNothing
  static constexpr int kNothing = -1;  // a step of zeros, of an item without runs: each has a step
  uint32_t target = 0;         // the stage for the next step
  uint32_t to_left, to_right;  // a thread's first chunks of a step in it
  int ahead = 0;               // steps that are copied and not multiplied
  int to_copy = 0;             // steps of the item
  enum Next { kUnknown, kNumbered, kRead } next = kUnknown;  // what is known of the item after it, or under way
  enum State { kCopies, kCopied, kWaits, kEnds } state = kCopied;  // kCopied: the next step is copied already

  __device__ Loader(Memory& shared, const KernelParams& p) : shared(shared), p(p), list(p) {}

  __device__ __forceinline__ uint32_t stages() const { return ptx::shared_address(shared.stages); }
  // From one stage to the next one, in bytes.
  static __device__ __forceinline__ int to_next(uint32_t stage) { return stage == (kStages - 1) * kStageBytes ? (1 - kStages) * kStageBytes : kStageBytes; }
  __device__ Item& at(int number) { return shared.items[number % kSlots]; }

  // One step, while another one is multiplied: where from and where to, early, since an address that changes right after a copy or
  // a load that took it waits for it. `next`: the stage for the step after it.
  __device__ __forceinline__ void aim(uint32_t next) {
    left.move();
    right.move();
    to_left = ptx::moved(left.to, target);
    to_right = ptx::moved(right.to, target);
    if (state < kWaits) target = next;
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
        aim(target + to_next(target));
        copy();
        ++ahead;
        --steps;
        --to_copy;
        copied = true;
      } else if (state == kCopies && rest != 0) {
        copy_rest();
      } else {
        if (state != kWaits && !goes_on()) take_item();
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

  __device__ __forceinline__ void serve_if_needed() {
    if (free_steps() == 0) serve();
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
    if constexpr (kSegmented) {
      if (threadIdx.x == 0) runs::count<kBackward>(p, at(item), shared.steps[item % kSlots]);
      if (threadIdx.x == 32) runs::begin<kBackward>(p, at(item), shared.run);
      __syncthreads();
    }
    to_copy = steps_of(item);
  }

  // All of an item.
  __device__ int steps_of(int number) {
    if constexpr (kSegmented) return uniform(shared.steps[number % kSlots].all);
    const Head head = head_of(number);
    if (head.work == Work::kEnd) return 0;
    if (head.work == Work::kShrink) return steps_of_depth(head, head.part);
    if (head.work != Work::kTile) return sm80::steps_of(tokens_of(at(number)));
    int sum = kGates ? steps_of_depth(head, 0) : 0;
    for (int i = first_part(head.part); i < last_part(head.part); ++i) {
      sum += (kGates ? 0 : steps_of_depth(head, i)) + (head.has_ranks() ? sm80::steps_of(p.part[i].r) : 0);
    }
    return sum;
  }

  __device__ Head head_of(int number) { return Head(at(number)); }

  // Of a shrink item: one that is cut has all of them.
  static __device__ int first_rank(const Head& head, const Item& item) { return head.is_half() ? 0 : item.rank; }

  // Of a part's depth, what an item sums over.
  struct Range {
    int first, last;
  };
  __device__ Range depth_of(const Head& head, int part) const {
    const int depth = p.part[part].depth;
    if (!head.is_half()) return {0, depth};
    const int half = sm80::steps_of(depth) / 2 * kDepth;
    return head.is_first() ? Range{0, half} : Range{half, depth};
  }
  __device__ Range ranks_of(const Head& head, int part) const { return {0, head.has_ranks() ? p.part[part].r : 0}; }
  __device__ int steps_of_depth(const Head& head, int part) const {
    const Range range = depth_of(head, part);
    return sm80::steps_of(range.last - range.first);
  }

  // Which a gradient sums over.
  __device__ int tokens_of(const Item& item) const { return uniform(min(p.M - item.row, item.rows)); }

  // A tile's parts.
  __device__ int first_part(int part) const { return kBackward || kGates ? 0 : part; }
  __device__ int last_part(int part) const { return kBackward ? p.summed : kGates ? 2 : part + 1; }

  // Of a tile, those over its depth.
  __device__ int steps_before_ranks(int number) {
    if constexpr (kSegmented) return uniform(shared.steps[number % kSlots].depth);
    const Head head = head_of(number);
    if (kGates) return steps_of_depth(head, 0);
    int sum = 0;
    for (int i = first_part(head.part); i < last_part(head.part); ++i) sum += steps_of_depth(head, i);
    return sum;
  }

  __device__ Work work_of(int number) { return head_of(number).work; }

  // To the item's next segment, if there is one.
  __device__ bool goes_on() {
    ++segment;
    if constexpr (kSegmented) {
      if (item < 0 || !shared.run.exists) return false;
      __syncthreads();  // all have read the one before
      if (threadIdx.x == 0) runs::advance<kBackward>(p, at(item), shared.run);
      __syncthreads();
      return shared.run.exists;
    } else {
      return segment < segments();
    }
  }

  __device__ int segments() {
    if (item < 0) return 0;
    return work_of(item) != Work::kTile ? 1 : kGates ? 3 : 2 * (kBackward ? p.summed : 1);
  }

  // What it reads may not be there yet.
  __device__ __forceinline__ void begin_segment() {
    if constexpr (kSegmented) return begin_run();
    const Head head = head_of(item);
    const Work work = head.work;
    const Item of = at(item);
    int sum = 0;
    bool ready = true;
    if (work == Work::kShrink) {
      const Part& part = p.part[head.part];
      const Range depth = depth_of(head, head.part);
      sum = depth.last - depth.first;
      left.begin_k_major(from(part.lhs, depth.first), of.row, p.M, stages());
      begin_right(part.down, depth.first, first_rank(head, of), part.r);
    } else if (kGates && work == Work::kTile) {
      const bool ranks = segment > 0;
      const int i = ranks ? segment - 1 : 0;
      const Part& part = p.part[i];
      const Range depth = ranks ? ranks_of(head, i) : depth_of(head, i);
      sum = depth.last - depth.first;
      if (ranks && sum > 0) ready = is_raised(of.waits + i * p.low_flags, p.row_flags);
      left.begin_k_major(from(ranks ? part.low : part.lhs, depth.first), of.row, p.M, stages());
      // The ranks of one are multiplied with its columns alone.
      right.begin_halves(from(ranks ? part.up : p.part[right.half()].weight, depth.first), of.col, part.cols, stages() + kLeftBytes);
    } else if (work == Work::kTile) {
      const int count = kBackward ? p.summed : 1, i = segment < count ? segment : segment - count, own = first_part(head.part) + i;
      const Part& part = p.part[own];
      const bool ranks = segment >= count;
      const Range depth = ranks ? ranks_of(head, own) : depth_of(head, own);
      sum = depth.last - depth.first;
      if (ranks && sum > 0) ready = is_raised(of.waits + i * p.low_flags, p.row_flags);
      left.begin_k_major(from(ranks ? part.low : part.lhs, depth.first), of.row, p.M, stages());
      begin_right(ranks ? part.up : part.weight, depth.first, of.col, part.cols);
    } else if (kBackward && work != Work::kEnd) {
      const Part& part = p.part[head.part];
      const Gradient& g = work == Work::kGradientA ? part.dA : part.dB;
      sum = tokens_of(of);
      if (uniform(of.waits) != work::kNone) ready = is_raised(of.waits, uniform(of.rows) / kBlockM * p.row_flags);
      left.begin_mn_major(g.big, of.row, of.col, g.cols, stages());
      begin_right(g.low, of.row, of.rank, part.r);
    }
    steps = sum / kDepth;
    rest = sum % kDepth;
    state = work == Work::kEnd ? kEnds : ready ? kCopies : kWaits;
  }

  __device__ __forceinline__ void begin_run() {
    const Item& of = at(item);
    const Work work = work_of(item);
    const Run& run = shared.run;
    const bool exists = run.exists;
    const int sum = exists ? uniform(run.sum) : 0;
    const Part& part = p.part[exists ? uniform(run.part) : 0];
    const uint32_t right_at = stages() + kLeftBytes;
    bool ready = true;
    if (!exists) {
      left.begin_k_major(part.lhs, 0, p.M, stages());
      begin_right(part.weight, 0, 0, part.cols);
    } else if (work == Work::kShrink) {
      left.begin_k_major(part.lhs, of.row, p.M, stages());
      right.begin_k_major(part.down, uniform(run.first), uniform(run.end), right_at);
    } else if (work == Work::kTile && uniform(run.level) == Run::kOfDepth) {
      left.begin_k_major(part.lhs, of.row, p.M, stages());
      begin_right(part.weight, 0, of.col, part.cols);
    } else if (work == Work::kTile) {
      ready = is_raised(of.waits + (kBackward ? run.part * p.low_flags : 0), p.row_flags);
      left.begin_k_major(from(low_at(part.low, run.low_row), run.column), 0, kSegmentRows, stages());
      right.begin_mn_major(part.up, run.first, of.col, part.cols, right_at);
    } else {
      const Gradient& g = work == Work::kGradientA ? part.dA : part.dB;
      if (uniform(of.waits) != work::kNone) ready = is_raised(of.waits, uniform(of.rows) / kBlockM * p.row_flags);
      left.begin_mn_major(g.big, run.row, of.col, g.cols, stages());
      right.begin_mn_major(low_at(g.low, run.low_row), 0, 0, kLowBox, right_at);
    }
    steps = sum / kDepth;
    rest = work == Work::kEnd ? 0 : exists ? sum % kDepth : kNothing;
    state = work == Work::kEnd ? kEnds : ready ? kCopies : kWaits;
  }
  static __device__ Matrix low_at(const Matrix& low, int row) { return {low.data + int64_t{row} * low.stride, low.stride}; }

  // Of the sum from `depth` on, columns `first` to `last`.
  __device__ __forceinline__ void begin_right(const Matrix& matrix, int depth, int first, int last) {
    const uint32_t target = stages() + kLeftBytes;
    if constexpr (kBackward) right.begin_mn_major(matrix, depth, first, last, target);
    else right.begin_k_major(from(matrix, depth), first, last, target);
  }

  // A matrix without its first columns.
  static __device__ Matrix from(const Matrix& matrix, int col) { return {matrix.data + col * 2, matrix.stride}; }

  // The last step of a segment.
  __device__ void copy_rest() {
    const int left_rows = kSegmented ? max(rest, 0) : rest;
    if (kBackward && work_of(item) >= Work::kGradientA) left.copy_end_mn_major(target, left_rows);
    else left.copy_end_k_major(target, left_rows);
    bool right_mn = kBackward;
    if constexpr (kSegmented) right_mn = shared.run.right_mn;
    if (right_mn) right.copy_end_mn_major(target, left_rows);
    else right.copy_end_k_major(target, left_rows);
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
