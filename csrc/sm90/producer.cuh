// The thread that loads: for each item the boxes of its steps, in the order in which the consumers multiply them.
#pragma once

#include "params.cuh"
#include "pipeline.cuh"
#include "spans.cuh"

namespace fused_lora::sm90 {

constexpr int kLookahead = 8;  // steps before the end of an item at which the next one may be taken

template <typename C, bool kBackward, bool kDrops>
struct Producer {
  Shared<C>& shared;
  const KernelParams& p;
  const int rank;  // of the block in its cluster
  static constexpr int kRankBoxes = boxes_of(C::kBlockR);
  static constexpr int kHalf = C::kTileCols / kBox;  // boxes of one of two linears in a gated tile
  Ring<C::kStages> ring{};
  int ready = work::kNone;  // the column of tiles whose weight was waited for last

  // A free stage, in which so many bytes will land.
  __device__ uint32_t begin_step(int bytes) {
    await_stage();
    return expect(bytes);
  }
  __device__ void await_stage() { ptx::mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1); }
  __device__ uint32_t expect(int bytes) {
    ptx::mbarrier_arrive_expect_tx(&shared.full[ring.stage], bytes);
    return ptx::shared_address(shared.stages[ring.stage]);
  }

  // Boxes side by side along columns (kMN) or stacked along rows.
  template <bool kMN>
  __device__ void load(uint32_t target, const CUtensorMap* map, int row, int col, int boxes) {
    for (int i = 0; i < boxes; ++i) {
      ptx::tma_load(target + i * kBoxBytes, map, row + (kMN ? 0 : i * kBox), col + (kMN ? i * kBox : 0), &shared.full[ring.stage]);
    }
  }

  // The same boxes for both blocks of the cluster: each loads every other one for both.
  template <bool kMN>
  __device__ void load_for_both(uint32_t target, const CUtensorMap* map, int row, int col, int boxes) {
    for (int first = 0; first < boxes; first += kCluster) {  // so that the compiler counts them
      const int i = first + rank;
      if (i >= boxes) break;
      ptx::tma_load_multicast(target + i * kBoxBytes, map, row + (kMN ? 0 : i * kBox), col + (kMN ? i * kBox : 0),
                              &shared.full[ring.stage], (1 << kCluster) - 1);
    }
  }

  // The right operand of a product at columns `col` of its result, and `k` of the sum.
  template <bool kMN = kBackward>
  __device__ void load_right(uint32_t target, const CUtensorMap* map, int col, int k, int boxes) {
    load_for_both<kMN>(target, map, kMN ? k : col, kMN ? col : k, boxes);
  }

  // The next item may be taken: late, so that whoever is free first takes it, and early enough to hide that.
  __device__ void release_item() { ptx::mbarrier_arrive_at(&shared.item_empty, 0); }

  // Of a block's rows, the first of whose flags is given.
  __device__ void wait_for_low(int flag, int mark) {
    ptx::flag_pair_wait(p.flags + flag, mark);
    ptx::fence_async_global();
  }
  // The same, of this block's rows of an item's low, `part` parts behind the item's first.
  __device__ void wait_for_own_low(const Item& item, int part) {
    wait_for_low(item.waits + part * p.low_flags + rank * kConsumers, item.mark);
  }

  // Of all parts of a tile, whose weights are dequantised first.
  __device__ void wait_for_weight(const Item& item) {
    if (p.ring.pieces == 0) return;
    const int column = (item.raises - p.ring.done) / (2 * p.ring.rows);
    if (column == ready) return;
    const int* flags = p.flags + p.ring.ready + column * p.ring.ready_stride;
    while (!ptx::flags_are(flags, p.ring.of_tile, item.mark)) __nanosleep(64);
    ptx::acquire();
    ptx::fence_async_global();
    ready = column;
  }

  __device__ void run(const Item& item) {
    if (item.work == Work::kShrink) return shrink(item);
    if (item.work == Work::kTile) {
      if constexpr (C::kGates) return tile_gated(item);
      return tile(item);
    }
    if constexpr (kBackward && !C::kGateGrads) gradient(item);
  }

  static __device__ int place_of(const Part& part, const Item& item) { return part.ring != nullptr ? item.place : item.col; }

  __device__ void shrink(const Item& item) {
    const Part& part = p.part[item.part];
    for (int done = 0; done < item.rows; done += item.stride) {
      const bool last = done + item.stride == item.rows;
      if constexpr (C::kSegmented) {
        shrink_segments(part, item.row + done, last);
      } else {
        shrink(part, item.row + done, 0, last);
      }
    }
  }

  __device__ void shrink_segments(const Part& part, int row, bool last) {
    for (int level = 0; level < part.segments.levels; ++level) {
      const bool last_level = last && level + 1 == part.segments.levels;
      const Span<C> span(part.segments, level, row);
      for (int window = span.first_window(); window < span.end_window(); ++window) {
        shrink(part, row, span.rank(window), last_level && window + 1 == span.end_window());
      }
      if (last_level && span.is_empty()) release_item();
    }
  }

  // Of an item's rows from `row` on, by the ranks from `first_rank` on.
  __device__ void shrink(const Part& part, int row, int first_rank, bool last) {
    constexpr int kWidth = C::kShrinkHalves * kBox;
    const int release_at = last ? lookahead(part.depth, kWidth) : -1;
    row += rank * kBlockM;
#pragma unroll 1
    for (int k = 0; k < part.depth; k += kWidth) {
      const uint32_t stage = begin_step(C::kShrinkBoxes * kBoxBytes);
      for (int half = 0; half < C::kShrinkHalves; ++half) {
        load<false>(stage + 2 * half * kBoxBytes, &part.lhs, row, k + half * kBox, 2);
        load_right<kDownMN<C, kBackward>>(stage + (2 * C::kShrinkHalves + half * boxes_of(C::kBlockR)) * kBoxBytes, &part.down,
                                          first_rank, k + half * kBox, boxes_of(C::kBlockR));
      }
      ring.advance();
      if (k == release_at) release_item();
    }
  }

  // The first element of the step, of `width` out of `size`, after which the next item may be taken.
  __device__ static int lookahead(int size, int width) { return max(0, size - kLookahead * width) / width * width; }

  // Forward a tile is one linear's; backward it sums over all of them. What may have to be waited for comes last.
  __device__ void tile(const Item& item) {
    const int row = item.row + rank * kBlockM;
    const int first = kBackward ? 0 : item.part, last = kBackward ? p.summed : item.part + 1;
    const bool riding = rides<C, kBackward, kDrops>(item);
    wait_for_weight(item);
    if constexpr (C::kSegmented) announce_steps(rank_steps(item, first, last));
    for (int i = first; i < last; ++i) {
      const Part& part = p.part[i];
      const int release_at = i + 1 == last ? lookahead(part.depth, kBox) : -1, place = place_of(part, item);
#pragma unroll 1
      for (int k = 0; k < part.depth; k += kBox) {
        const uint32_t stage = begin_step(C::kTileBoxes * kBoxBytes + (riding ? C::kRideBytes : 0));
        load<false>(stage, &part.lhs, row, k, 2);
        load_right(stage + 2 * kBoxBytes, &part.weight, place, k, C::kBlockN / kBox);
        if (riding) load_right(stage + C::kTileBoxes * kBoxBytes, &p.down_riding, 0, k, 1);
        ring.advance();
        if (k == release_at) release_item();
      }
    }
    tile_ranks(item, first, last, riding);
  }

  // Of two linears at once: half of the right operand is each one's. Steps over ranks are one linear's, of all ranks and 64 columns.
  __device__ void tile_gated(const Item& item) {
    const int row = item.row + rank * kBlockM, col = item.col;
    const int depth = p.part[0].depth, release_at = lookahead(depth, kBox);
    const int places[2] = {place_of(p.part[0], item), place_of(p.part[1], item) + (p.part[1].ring != nullptr ? C::kTileCols : 0)};
    wait_for_weight(item);
    if constexpr (C::kSegmented) announce_steps(kHalf * rank_steps(item, 0, 2));
#pragma unroll 1
    for (int k = 0; k < depth; k += kBox) {
      const uint32_t stage = begin_step(C::kTileBoxes * kBoxBytes);
      load<false>(stage, &p.part[0].lhs, row, k, 2);
      for (int i = 0; i < 2; ++i) load_right(stage + (2 + i * kHalf) * kBoxBytes, &p.part[i].weight, places[i], k, kHalf);
      ring.advance();
      if (k == release_at) release_item();
    }
    for (int i = 0; i < 2; ++i) {
      const Part& part = p.part[i];
      if constexpr (C::kSegmented) {
        tile_segments(part, item, i);
        continue;
      }
      if (part.r == 0) continue;
      wait_for_own_low(item, i);
#pragma unroll 1
      for (int box = 0; box < kHalf; ++box) {
        const uint32_t stage = begin_step(3 * kRankBoxes * kBoxBytes);
        for (int k = 0; k < kRankBoxes; ++k) load<false>(stage + 2 * k * kBoxBytes, &part.low, row, k * kBox, 2);
        load_for_both<true>(stage + 2 * kRankBoxes * kBoxBytes, &part.up, col + box * kBox, 0, kRankBoxes);
        ring.advance();
      }
    }
  }

  __device__ void tile_ranks(const Item& item, int first, int last, bool riding) {
    const int row = item.row + rank * kBlockM, col = item.col;
    for (int i = first; i < last; ++i) {
      const Part& part = p.part[i];
      if constexpr (C::kSegmented) {
        tile_segments(part, item, i - first);
        continue;
      }
      if (part.r > 0 && !riding) wait_for_own_low(item, i - first);
#pragma unroll 1
      for (int k = 0; k < part.r; k += kBox) {
        const uint32_t stage = begin_step((C::kTileBoxes - (riding ? 2 : 0)) * kBoxBytes);
        if (!riding) load<false>(stage, &part.low, row, k, 2);
        load_right(stage + 2 * kBoxBytes, &part.up, col, k, C::kBlockN / kBox);
        ring.advance();
      }
    }
  }

  __device__ void tile_segments(const Part& part, const Item& item, int which) {
    bool waited = false;
    for (int level = 0; level < part.segments.levels; ++level) {
      const Span<C> span(part.segments, level, item.row);
      if (span.is_empty()) continue;
      if (!waited) wait_for_own_low(item, which);
      waited = true;
#pragma unroll 1
      for (int box = span.first_box(); box < span.end_box(); ++box) {
        const int row = span.low_row(box) + rank * kBlockM, up = span.rank_of_box(box), first = span.first_slice(box);
        const Ranks ranks{kDrops ? which << 16 | level : 0, static_cast<int16_t>(first), static_cast<int16_t>(span.end_slice(box) - first)};
        if constexpr (C::kGates) {
          for (int i = 0; i < kHalf; ++i) load_ranks<1>(part, {which * kHalf + i, ranks.first, ranks.count}, row, up, item.col + i * kBox);
        } else {
          load_ranks<C::kBlockN / kBox>(part, ranks, row, up, item.col);
        }
      }
    }
  }

  // A step of so many boxes of columns.
  template <int kBoxes>
  __device__ void load_ranks(const Part& part, const Ranks& ranks, int row, int up, int col) {
    await_stage();
    shared.ranks[ring.stage] = ranks;
    const uint32_t stage = expect((2 + kBoxes) * kBoxBytes);
    load<false>(stage, &part.low, row, 0, 2);
    load_right<kUpMN<C, kBackward>>(stage + 2 * kBoxBytes, &part.up, col, up, kBoxes);
    ring.advance();
  }

  // Before a tile's first step: with how many ranks there will be.
  __device__ void announce_steps(int steps) {
    await_stage();
    shared.ranks[ring.stage].steps_or_of = steps;
  }

  __device__ int rank_steps(const Item& item, int first, int last) const {
    int steps = 0;
    for (int i = first; i < last; ++i) {
      const work::Segments& segments = p.part[i].segments;
      for (int level = 0; level < segments.levels; ++level) steps += Span<C>(segments, level, item.row).boxes();
    }
    return steps;
  }

  __device__ void gradient_segments(const Item& item) {
    const Part& part = p.part[item.part];
    release_item();  // nobody knows here when it ends
    for (int level = 0; level < part.segments.levels; ++level) {
      for (Windows<C> windows(part.segments, level, item, p.M); windows.exist(); windows.advance()) {
        gradient_window(part, item, windows);
      }
    }
  }

  // By the steps that have rows of it; where two windows meet in a step, it comes for both.
  __device__ void gradient_window(const Part& part, const Item& item, const Windows<C>& windows) {
    const Gradient& g = item.work == Work::kGradientA ? part.dA : part.dB;
    constexpr int kBigBoxes = C::kGradientCols / kBox;
    const int col = item.col + rank * C::kGradientCols;
    int low_row = 0;  // of the step's block of rows
#pragma unroll 1
    for (int step = 0; step < windows.steps(); ++step) {
      const int row = windows.first_step_row() + step * kBox;
      if (item.waits != work::kNone && (row % kBlockM == 0 || step == 0)) {
        wait_for_low(item.waits + (row / kBlockM * kBlockM - item.row) / kFlagRows, item.mark);
      }
      if (row % kPairRows == 0 || step == 0) {
        low_row = Span<C>(part.segments, windows.level, row / kPairRows * kPairRows).low_row_of(windows.index);
      }
      const uint32_t stage = begin_step(C::kGradientBoxes * kBoxBytes);
      load<true>(stage, &g.big, row, col, kBigBoxes);
      for (int i = 0; i < boxes_of(C::kBlockR); ++i) {
        load_for_both<true>(stage + (kBigBoxes + i) * kBoxBytes, &g.low, low_row + row % kPairRows + i * kPairRows, 0, 1);
      }
      ring.advance();
    }
  }

  __device__ void gradient(const Item& item) {
    if constexpr (C::kSegmented) return gradient_segments(item);
    const Part& part = p.part[item.part];
    const Gradient& g = item.work == Work::kGradientA ? part.dA : part.dB;
    constexpr int kBigBoxes = C::kGradientCols / kBox;
    const int col = item.col + rank * C::kGradientCols, tokens = min(p.M - item.row, item.rows);
    const int release_at = lookahead(tokens, kBox);
    const bool products = item.work == Work::kGradientB && part.dgain != nullptr;
    for (int i = 0; i < tokens; i += kBox) {
      const int row = item.row + i;
      if (item.waits != work::kNone && i % kBlockM == 0) wait_for_low(item.waits + i / kFlagRows, item.mark);
      const uint32_t stage = begin_step(C::kGradientBoxes * kBoxBytes);
      load<true>(stage, &g.big, row, col, kBigBoxes);
      load_for_both<true>(stage + kBigBoxes * kBoxBytes, &g.low, row, 0, boxes_of(C::kBlockR));
      ring.advance();
      if (products) {
        load<true>(begin_step(kBigBoxes * kBoxBytes), &part.y, row, col, kBigBoxes);
        ring.advance();
      }
      if (i == release_at) release_item();
    }
  }
};

}  // namespace fused_lora::sm90
