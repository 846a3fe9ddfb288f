// Where rows have adapters of their own, what an item sums over comes in runs: a part's depth, once for each window of a shrink item;
// the ranks of a box of low; and of a gradient the tokens of a window in a block. One thread finds the next one and leaves it in shared
// memory, by functions that are not inlined: where products are under way, no thread has registers to look for it.
#pragma once

#include "../spans.cuh"
#include "params.cuh"

namespace fused_lora::sm80 {

// Of an item.
struct Run {
  bool exists;
  int part, level;     // level: kOfDepth while a tile's depths are summed
  int at, row;         // its box or window; and of a gradient its first token
  int sum;             // what it sums over
  int low_row, first;  // of low; its first rank in the slabs
  int end;             // of a shrink item's ranks, which the slabs may not have all
  int column;          // of low's box, the first one
  bool right_mn;       // whether what it sums over are the right operand's rows
  static constexpr int kOfDepth = -1;
};

// Of an item whose results are a window's, the one that is multiplied. An item without any has one of nothing, and multiplies zeros.
struct WindowOfItem {
  bool exists, is_nothing;
  int level, at;
  int steps;
  int low_row;      // of a shrink item, where its low goes
  int bits, slice;  // of a gradient; and its first slice of ranks in the slabs
};

// How many steps an item has, those before its ranks, and whether there is something in them.
struct StepsOfItem {
  int all, depth;
  bool are_some;
};

namespace runs {

struct Finder {
  const KernelParams& p;
  const Item& item;

  __device__ bool is_tile() const { return item.work == Work::kTile; }
  __device__ const Part& part(int i) const { return p.part[i]; }
  __device__ Span span(int of, int level) const { return {part(of).segments, p.rank, level, item.row}; }
  __device__ Windows windows(int of, int level) const { return {part(of).segments, p.rank, level, item, p.M}; }
  __device__ Windows window(int of, int level, int at) const {
    Windows own = windows(of, level);
    own.advance_to(at);
    return own;
  }
  // Of a window's rows in this slice, those from `row` on in one block end here.
  static __device__ int run_end(const Windows& own, int row) { return min(own.end_row(), (row / kSegmentRows + 1) * kSegmentRows); }
  static __device__ int steps_of_window(const Windows& own) {
    int sum = 0;
    for (int row = own.first_row(); row < own.end_row(); row = run_end(own, row)) sum += steps_of(run_end(own, row) - row);
    return sum;
  }
  // None of a box behind the slab's end, which lies among a block's where its windows do.
  static __device__ int ranks_of_box(const Span& of, int box) {
    return of.rank_of_box(box) < of.segments.ranks ? (of.end_slice(box) - of.first_slice(box)) * work::kSlice : 0;
  }
};

template <bool kBackward>
struct Runs : Finder {
  Run& run;

  __device__ int first_part() const { return kBackward && is_tile() ? 0 : item.part; }
  __device__ int end_part() const { return kBackward && is_tile() ? p.summed : item.part + 1; }
  __device__ int levels() const { return part(run.part).segments.levels; }

  __device__ void begin() {
    run.exists = item.work != Work::kEnd;
    if (!run.exists) return;
    run.part = first_part();
    run.level = is_tile() ? Run::kOfDepth : 0;
    run.right_mn = item.work != Work::kShrink && (kBackward || !is_tile());
    if (is_tile()) {
      run.sum = part(run.part).depth;
    } else if (item.work == Work::kShrink) {
      find_window_of_block(span(run.part, 0).first_window());
    } else {
      find_rows(windows(run.part, 0).index, kNone);
    }
  }

  __device__ void advance() {
    if (run.level == Run::kOfDepth && ++run.part < end_part()) {
      run.sum = part(run.part).depth;
    } else if (run.level == Run::kOfDepth) {
      run.part = first_part();
      run.level = 0;
      run.right_mn = true;
      find_box(span(run.part, 0).first_box());
    } else if (is_tile()) {
      find_box(run.at + 1);
    } else if (item.work == Work::kShrink) {
      find_window_of_block(run.at + 1);
    } else {
      find_rows(run.at, run.row);
    }
  }

 private:
  static constexpr int kNone = -1;

  // From a box on, of this level, the next ones and the next parts: the first that has ranks.
  __device__ void find_box(int box) {
    do {
      find_any_box(box);
      box = run.at + 1;
    } while (run.exists && run.sum == 0);
  }

  __device__ void find_any_box(int box) {
    for (;;) {
      const Span of = span(run.part, run.level);
      if (!of.is_empty() && box < of.end_box()) {
        run.at = box;
        run.sum = ranks_of_box(of, box);
        run.column = of.first_slice(box) * work::kSlice;
        run.low_row = of.low_row(box);
        run.first = of.rank_of_box(box) + run.column;
        return;
      }
      if (++run.level == levels()) {
        run.level = 0;
        if (++run.part == end_part()) break;
      }
      box = span(run.part, run.level).first_box();
    }
    run.exists = false;
  }

  __device__ void find_window_of_block(int window) {
    for (;;) {
      const Span of = span(run.part, run.level);
      if (window < of.end_window()) {
        run.at = window;
        run.sum = part(run.part).depth;
        run.first = of.rank(window) + item.rank;
        run.end = min(run.first + kLowBox, of.segments.ranks);
        return;
      }
      if (++run.level == levels()) break;
      window = span(run.part, run.level).first_window();
    }
    run.exists = false;
  }

  // From a window on, behind the run that begins at `row`, or from its beginning.
  __device__ void find_rows(int at, int row) {
    for (;;) {
      for (Windows own = window(run.part, run.level, at); own.exist(); own.advance(), row = kNone) {
        run.row = row == kNone ? own.first_row() : run_end(own, row);
        if (run.row >= own.end_row()) continue;
        run.at = own.index;
        run.sum = run_end(own, run.row) - run.row;
        const int block = run.row / kSegmentRows * kSegmentRows;
        run.low_row = Span(part(run.part).segments, p.rank, run.level, block).low_row_of(own.index) + item.rank / kLowBox * kSegmentRows + run.row - block;
        return;
      }
      if (++run.level == levels()) break;
      at = windows(run.part, run.level).index;
      row = kNone;
    }
    run.exists = false;
  }
};

template <bool kBackward>
__noinline__ __device__ void begin(const KernelParams& p, const Item& item, Run& run) {
  Runs<kBackward>{{p, item}, run}.begin();
}

template <bool kBackward>
__noinline__ __device__ void advance(const KernelParams& p, const Item& item, Run& run) {
  Runs<kBackward>{{p, item}, run}.advance();
}

template <bool kBackward>
__noinline__ __device__ void count(const KernelParams& p, const Item& item, StepsOfItem& steps) {
  const Finder find{p, item};
  steps = {0, 0, false};
  if (item.work == Work::kEnd) return;
  const bool sums = kBackward && find.is_tile();
  for (int i = sums ? 0 : item.part; i < (sums ? p.summed : item.part + 1); ++i) {
    const Part& part = p.part[i];
    if (find.is_tile()) steps.depth += steps_of(part.depth);
    for (int level = 0; level < part.segments.levels; ++level) {
      const Span of = find.span(i, level);
      if (find.is_tile()) {
        for (int box = of.first_box(); box < of.first_box() + of.boxes(); ++box) steps.all += steps_of(find.ranks_of_box(of, box));
      } else if (item.work == Work::kShrink) {
        steps.all += (of.end_window() - of.first_window()) * steps_of(part.depth);
      } else {
        for (Windows own = find.windows(i, level); own.exist(); own.advance()) steps.all += find.steps_of_window(own);
      }
    }
  }
  steps.all += steps.depth;
  steps.are_some = steps.all > 0;
  steps.all = max(1, steps.all);
}

// The first window, or the next one.
__noinline__ __device__ inline void find_window(const KernelParams& p, const Item& item, const StepsOfItem& steps, WindowOfItem& window, bool first) {
  const Finder find{p, item};
  const int levels = p.part[item.part].segments.levels;
  const bool shrinks = item.work == Work::kShrink, begins = first;
  if (begins) window = {true, false, 0, 0, 0, 0, 0, 0};
  for (; window.level < levels; ++window.level, first = true) {
    const Span of = find.span(item.part, window.level);
    if (shrinks) {
      window.at = first ? of.first_window() : window.at + 1;
      if (window.at >= of.end_window()) continue;
      window.steps = steps_of(p.part[item.part].depth);
      window.low_row = of.low_row_of(window.at) + item.rank / kLowBox * kSegmentRows;
      return;
    }
    Windows own = find.windows(item.part, window.level);
    if (!first) own.advance_to(window.at + 1);
    if (!own.exist()) continue;
    window.at = own.index;
    window.steps = begins && !steps.are_some ? 1 : find.steps_of_window(own);
    window.bits = own.bits();
    window.slice = (own.rank() + item.rank) / work::kSlice;
    return;
  }
  window.is_nothing = begins;
  window.exists = begins;
  window.steps = 1;
}

}  // namespace runs
}  // namespace fused_lora::sm80
