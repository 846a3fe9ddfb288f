// A warpgroup that multiplies: 64 of the 128 rows of a block's tile, and what becomes of the results.
#pragma once

#include <type_traits>

#include "../columns.cuh"
#include "chain.cuh"
#include "mask.cuh"
#include "outbox.cuh"
#include "spans.cuh"

namespace fused_lora::sm90 {

template <typename C, typename T, bool kBackward, bool kDrops>
struct Consumer {
  Shared<C>& shared;
  const KernelParams& p;
  const int rank;  // of the block in its cluster
  const Warpgroup self;
  Outbox<C, T> outbox{shared, p, self};
  Ring<C::kStages> ring{};
  int in_flight = kNone;  // the stage whose products are
  static constexpr int kNone = -1;

  __device__ __forceinline__ void run(const Item& item) {
    if (item.work == Work::kShrink) return shrink(item);
    if (item.work == Work::kTile) return tile(item);
    if constexpr (kBackward && !C::kGateGrads) gradient(item);
  }

  // Among an item's rows from `row` on, and its flags.
  __device__ int own_row(int row) const { return row + rank * kBlockM + self.index * kBox; }
  __device__ int own_flag(int flag) const { return flag + rank * kConsumers + self.index; }

  // ---- steps -------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ uint32_t await_stage() {
    ptx::mbarrier_wait(&shared.full[ring.stage], ring.phase);
    return ptx::shared_address(shared.stages[ring.stage]);
  }

  __device__ __forceinline__ void release(int stage) {
    if (self.lane() < kCluster) ptx::mbarrier_arrive_at(&shared.empty[stage], self.lane());
  }

  // multiply(stage's address, step) for each step: one group of products each, of which one is always in flight.
  template <bool kSends = true, typename Multiply>
  __device__ __forceinline__ void consume(int steps, Multiply multiply) {
    issue<kSends>(steps, multiply);
    drain();
  }

  // The same, with the last group still in flight, also while others into the same accumulators follow. kSends: what may still be
  // in the outbox leaves meanwhile.
  template <bool kSends = true, typename Multiply>
  __device__ __forceinline__ void issue(int steps, Multiply multiply) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      multiply(await_stage(), step);
      if (in_flight != kNone) {
        ptx::wgmma_wait<1>();
        release(in_flight);
      }
      if (kSends && outbox.pending()) outbox.send_part();
      in_flight = ring.stage;
      ring.advance();
    }
  }

  __device__ __forceinline__ void drain() {
    ptx::wgmma_wait<0>();
    if (in_flight != kNone) release(in_flight);
    in_flight = kNone;
  }

  // The first ceil(left / 16) <= kMost slices of 16 of a step, as one group. Straight code for each count: a group that spans
  // a branch or a loop is cut up by the compiler, and then waited for too early.
  template <int kMost, bool kMN = kBackward, int kCount>
  __device__ __forceinline__ void multiply_slices(float (&acc)[kCount], uint64_t lhs, uint64_t rhs, int left) {
    if (kMost == 1 || left > (kMost - 1) * 16) {
      ptx::wgmma_fence();
#pragma unroll
      for (int s = 0; s < kMost; ++s) ptx::wgmma<T, false, kMN>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<kMN>);
      ptx::wgmma_commit();
    } else if constexpr (kMost > 1) {
      multiply_slices<kMost - 1, kMN>(acc, lhs, rhs, left);
    }
  }

  // What this warpgroup wrote to shared memory is seen by its products.
  __device__ void publish_shared() const {
    ptx::fence_async_shared();
    self.sync();
  }

  // ---- low = scale keep_scale lhs down ---------------------------------------------------------------------------------

  __device__ __forceinline__ void shrink(const Item& item) {
    if constexpr (C::kSegmented) return shrink_segments(item);
    int row = own_row(item.row), flag = own_flag(item.raises);
    for (int left = item.rows; left > 0; left -= item.stride, row += item.stride, flag += item.stride / kFlagRows) {
      const Part& part = p.part[item.part];
      float acc[C::kBlockR / 2] = {};
      if constexpr (kDrops && !kBackward) {
        BoxMask<> mask(Mask(part.dropout), self);
        mask.set_rows(row);
        multiply_masked(acc, part, mask);
      } else {
        consume(shrink_steps(part), [&](uint32_t stage, int) { multiply_shrink(acc, stage); });
      }
      scale_by(acc, low_scale(part) * part.dropout.keep_scale);
      outbox.keep(acc, &part.low, row, 0, flag);
      outbox.send_boxes();  // somebody may wait already
    }
  }

  // Of each window the ranks of a row's own adapter, by its own scale.
  __device__ __forceinline__ void shrink_segments(const Item& item) {
    const Part& part = p.part[item.part];
    keep_mark(item);
    int flag = own_flag(item.raises);
#pragma unroll 1
    for (int done = 0; done < item.rows; done += item.stride, flag += item.stride / kFlagRows) {
#pragma unroll 1
      for (int level = 0; level < part.segments.levels; ++level) {
        const Span<C> span(part.segments, level, item.row + done);
#pragma unroll 1
        for (int window = span.first_window(); window < span.end_window(); ++window) {
          float acc[C::kBlockR / 2] = {};
          if constexpr (kDrops && !kBackward) {
            BoxMask<true> mask(mask_of(part, level), self);
            const int first = own_row(item.row + done);
            mask.set_rows(first, threshold_of(part.segments, level, mask.row_of_lane(first)));
            multiply_masked(acc, part, mask);
          } else {
            consume(shrink_steps(part), [&](uint32_t stage, int) { multiply_shrink(acc, stage); });
          }
          choose_ranks(acc, part, level, own_row(item.row + done) + self.row(), window * (C::kBlockR / work::kSlice));
          outbox.keep(acc, &part.low, span.low_row_of(window) + own_row(0), 0, work::kNone);
          outbox.send_boxes();
        }
      }
      outbox.send_all();
      outbox.hold_flag(flag);
    }
  }

  // For the thread that waits for flags and raises them: an item without rows shows it no stage, behind which the producer's would be.
  // All threads store it: after what only some do here, the compiler takes the loops of products for divergent.
  __device__ __forceinline__ void keep_mark(const Item& item) { shared.mark = item.mark; }

  // Of a thread's two rows those ranks of a window that are their adapters'.
  __device__ __forceinline__ void choose_ranks(float (&acc)[C::kBlockR / 2], const Part& part, int level, int row, int first_slice) const {
    const auto scale_of = [](float scale) { return low_scale(scale); };
    const RowRanks own[2] = {{part.segments, part.scale, level, row, scale_of}, {part.segments, part.scale, level, row + 8, scale_of}};
#pragma unroll
    for (int i = 0; i < C::kBlockR / 2; ++i) acc[i] = own[i / 2 % 2].choose(acc[i], first_slice + i / 8);  // 8 registers have both rows' of 16 ranks
  }

  __device__ int shrink_steps(const Part& part) const { return ceil_div(part.depth, C::kShrinkHalves * kBox); }
  __device__ uint32_t left_box(uint32_t stage, int i) const { return stage + (2 * i + self.index) * kBoxBytes; }

  __device__ __forceinline__ void multiply_shrink(float (&acc)[C::kBlockR / 2], uint32_t stage) {
    multiply_boxes<C::kShrinkHalves, kSlices, kDownMN<C, kBackward>>(acc, stage, boxes_of(C::kBlockR));
  }

  // Boxes of the left operand by their first slices times those of the right one behind them, `right` for each.
  template <int kBoxes, int kFirstSlices, bool kMN = kBackward, int kCount>
  __device__ __forceinline__ void multiply_boxes(float (&acc)[kCount], uint32_t stage, int right) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const uint64_t lhs = descriptor<false>(left_box(stage, i));
      const uint64_t rhs = descriptor<kMN>(stage + (2 * kBoxes + i * right) * kBoxBytes);
#pragma unroll
      for (int s = 0; s < kFirstSlices; ++s) ptx::wgmma<T, false, kMN>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<kMN>);
    }
    ptx::wgmma_commit();
  }

  // Forward with dropout: the boxes of x that this warpgroup multiplies are its own, and are masked where they lie.
  template <bool kOfRows>
  __device__ __forceinline__ void multiply_masked(float (&acc)[C::kBlockR / 2], const Part& part, const BoxMask<kOfRows>& mask) {
    outbox.empty();
    consume<false>(shrink_steps(part), [&](uint32_t stage, int step) {
#pragma unroll
      for (int half = 0; half < C::kShrinkHalves; ++half) {
        mask.apply(left_box(stage, half), (step * C::kShrinkHalves + half) * kBox);
      }
      publish_shared();
      multiply_shrink(acc, stage);
    });
  }

  template <int kCount>
  __device__ void scale_by(float (&acc)[kCount], float scale) {
#pragma unroll
    for (float& value : acc) value *= scale;
  }

  __device__ float room(const Part& part) const { return fused_lora::room(*part.scale); }

  __device__ float low_scale(const Part& part) const { return low_scale(*part.scale); }
  static __device__ float low_scale(float scale) {
    if constexpr (kHasRoom<T> && !kBackward) return scale / fused_lora::room(scale);
    return scale;
  }

  // ---- out = gain (lhs weight + low up) + bias ------------------------------------------------------------------------------------

  __device__ __forceinline__ void tile(const Item& item) {
    constexpr bool kMasked = kBackward && kDrops;
    const Terms terms = terms_of(item);
    // Before steps that may wait for a flag which is pending here: those over r come soon with few steps before, and the first ones
    // wait for tiles that have read their weights, which wait for ranks. Where ranks are masked, everything leaves before them.
    if (p.ring.pieces > 0 || (!kMasked && terms.steps <= outbox.kMostBoxes + outbox.kFlagParts)) outbox.send_flag();
    float acc[C::kBlockN / 2] = {};
    const int row = own_row(item.row), col = item.col;
    if constexpr (kMasked && C::kSegmented) {
      await_stage();
      const int rank_steps = shared.ranks[ring.stage].steps_or_of;
      issue_depth(acc, terms.steps);
      drain();
      outbox.empty();
      add_masked_segments(acc, rank_steps, row, col);
    } else if constexpr (kMasked) {
      KeptBits<C::kBlockN / kBox> kept(Mask(p.part[0].dropout), row, col, self);  // the summed ones' x is one
      issue_masked_depth(acc, kept, terms.steps);
      add_masked_ranks(acc, kept, terms);
    } else if constexpr (C::kGates && C::kSegmented) {
      await_stage();
      const int rank_steps = shared.ranks[ring.stage].steps_or_of;
      issue_depth(acc, terms.steps);
      drain();
      outbox.empty();  // its registers are needed
      add_segments(acc, rank_steps, row + self.row());
    } else if constexpr (C::kGates) {
      issue_depth(acc, terms.steps);
      drain();
      outbox.empty();
      add_ranks(acc);
    } else if (rides<C, kBackward, kDrops>(item)) {
      if constexpr (can_ride<C, kBackward, kDrops>) multiply_riding(acc, item);
    } else if constexpr (C::kSegmented) {
      await_stage();
      const int rank_steps = shared.ranks[ring.stage].steps_or_of;
      issue_depth(acc, terms.steps);
      if constexpr (kHasRoom<T> && !kBackward) {
        float rooms[2];
        rooms_of_rows(rooms, p.part[item.part], row + self.row());
        drain();
        scale_rows(acc, {1 / rooms[0], 1 / rooms[1]});
        issue_segments(acc, rank_steps);
        drain();
        scale_rows(acc, {rooms[0], rooms[1]});
      } else {
        issue_segments(acc, rank_steps);
        drain();
      }
    } else {
      issue_depth(acc, terms.steps);
      if constexpr (kHasRoom<T> && !kBackward) {
        const float more = room(p.part[item.part]);
        drain();
        scale_by(acc, 1 / more);
        issue_ranks(acc, terms);
        drain();
        scale_by(acc, more);
      } else {
        issue_ranks(acc, terms);
        drain();
      }
    }
    if (p.ring.pieces > 0 && self.index == 0 && self.thread() == 0) ptx::flag_raise(p.flags + item.raises + rank, item.mark);
    if constexpr (C::kGates) {
      finish_columns(half<0>(acc), p.part[0], col);
      finish_columns(half<1>(acc), p.part[1], col);
    } else if constexpr (!kBackward) {
      finish_columns(acc, p.part[item.part], col);
    }
    outbox.keep_out(acc, kBackward ? 0 : item.part, row, col);
  }

  // What a tile sums over: steps over depth, those over ranks, and the first part.
  struct Terms {
    int steps, rank_steps, first;
  };

  __device__ Terms terms_of(const Item& item) const {
    Terms terms{boxes_of(p.part[item.part].depth), boxes_of(p.part[item.part].r), item.part};
    for (int i = 1; kBackward && i < p.summed; ++i) {
      terms.steps += boxes_of(p.part[i].depth);
      terms.rank_steps += boxes_of(p.part[i].r);
    }
    return terms;
  }

  // A loop of its own, since instructions between products take time from them.
  __device__ __forceinline__ void issue_depth(float (&acc)[C::kBlockN / 2], int steps) {
    issue(steps, [&](uint32_t stage, int) { multiply_step(acc, stage, kBox); });
  }

  // The mask is drawn while the last steps are multiplied, when nothing is left in the outbox, whose registers that takes.
  template <int kBoxes>
  __device__ __forceinline__ void issue_masked_depth(float (&acc)[C::kBlockN / 2], KeptBits<kBoxes>& kept, int steps) {
    const int drawn = min(steps, kept.kDraws);
    issue_depth(acc, steps - drawn);
    outbox.empty();
    issue<false>(drawn, [&](uint32_t stage, int step) {
      multiply_step(acc, stage, kBox);
      kept.draw(step);
    });
    for (int i = drawn; i < kept.kDraws; ++i) kept.draw(i);
    drain();
  }

  // 64 columns at a time, with sums of their own.
  template <int kBoxes>
  __device__ __forceinline__ void add_masked_ranks(float (&acc)[C::kBlockN / 2], const KeptBits<kBoxes>& kept, const Terms& terms) {
    int of = terms.first, left = 0;  // of a part's ranks
    const auto next = [&] {
      left -= kBox;
      while (left <= 0) left = p.part[of++].r;
      return left;
    };
    int steps = terms.rank_steps;
    if constexpr (C::kGated || C::kBlockR > 128) {
#pragma unroll 1
      for (; steps > 0; --steps) add_masked_step(acc, kept, next());
    } else {
#pragma unroll 1
      for (; steps > 1; steps -= 2) {
        const int lefts[2] = {next(), next()};
        add_masked_steps(acc, kept, lefts);
      }
      if (steps == 1) {
        const int lefts[1] = {next()};
        add_masked_steps(acc, kept, lefts);
      }
    }
  }

  // Steps are summed before they are masked, and some columns are added while the next ones are multiplied.
  template <int kSteps, int kBoxes>
  __device__ __forceinline__ void add_masked_steps(float (&acc)[C::kBlockN / 2], const KeptBits<kBoxes>& kept, const int (&left)[kSteps]) {
    uint32_t address[kSteps];
    const int first = ring.stage;
#pragma unroll
    for (uint32_t& each : address) {
      each = await_stage();
      ring.advance();
    }
    float sums[2][kBox / 2];
    const auto multiply = [&](float (&sum)[kBox / 2], int box) {
#pragma unroll
      for (float& value : sum) value = 0;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) multiply_box(sum, address[step], box, left[step]);
    };
    multiply(sums[0], 0);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      if (box + 1 < kBoxes) {
        multiply(sums[(box + 1) % 2], box + 1);
        ptx::wgmma_wait<kSteps>();
      } else {
        ptx::wgmma_wait<0>();
      }
      kept.add(acc, box, sums[box % 2]);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) release((first + step) % C::kStages);
  }

  // Of segments: the mask is a part's and a level's, by each row's threshold.
  __device__ __forceinline__ void add_masked_segments(float (&acc)[C::kBlockN / 2], int steps, int row, int col) {
    constexpr int kBoxes = C::kBlockN / kBox;
    while (steps > 0) {
      await_stage();
      const int of = __shfl_sync(~0u, shared.ranks[ring.stage].steps_or_of, 0), level = of & 0xFFFF;
      const Part& part = p.part[of >> 16];
      const int first = row + self.row();
      KeptBits<kBoxes, true> kept(mask_of(part, level), row, col, self,
                                  {threshold_of(part.segments, level, first), threshold_of(part.segments, level, first + 8)});
#pragma unroll
      for (int i = 0; i < kept.kDraws; ++i) kept.draw(i);
#pragma unroll 1
      do {
        add_masked_step(acc, kept, shared.ranks[ring.stage]);
        if (--steps == 0) return;
        await_stage();
      } while (__shfl_sync(~0u, shared.ranks[ring.stage].steps_or_of, 0) == of);
    }
  }

  static __device__ Mask mask_of(const Part& part, int level) { return Mask(static_cast<uint64_t>(*part.dropout.seed + level)); }

  // One after another: gated kernels and those for ranks above 128 have no registers for more.
  // own: as many ranks as are left, or those of the step.
  template <int kBoxes, bool kOfRows, typename Own>
  __device__ __forceinline__ void add_masked_step(float (&acc)[C::kBlockN / 2], const KeptBits<kBoxes, kOfRows>& kept, Own own) {
    const uint32_t address = await_stage();
#pragma unroll 1
    for (int box = 0; box < kBoxes; ++box) {
      float sum[kBox / 2] = {};
      multiply_box(sum, address, box, own);
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < kBoxes; ++b) {
        if (b == box) kept.add(acc, b, sum);
      }
    }
    release(ring.stage);
    ring.advance();
  }

  __device__ __forceinline__ void multiply_box(float (&sum)[kBox / 2], uint32_t stage, int box, int left) {
    const uint64_t lhs = descriptor<false>(stage + self.index * kBoxBytes), rhs = descriptor<true>(stage + (2 + box) * kBoxBytes);
    multiply_slices<kSlices>(sum, lhs, rhs, left);
  }

  __device__ __forceinline__ void multiply_box(float (&sum)[kBox / 2], uint32_t stage, int box, const Ranks& own) {
    const uint64_t lhs = descriptor<false>(stage + self.index * kBoxBytes) + own.first * kSlice<false>;
    const uint64_t rhs = descriptor<true>(stage + (2 + box) * kBoxBytes) + own.first * kSlice<true>;
    multiply_slices<kSlices>(sum, lhs, rhs, own.count * work::kSlice);
  }

  __device__ __forceinline__ void issue_ranks(float (&acc)[C::kBlockN / 2], const Terms& terms) {
    int of = terms.first, left = kBackward ? 0 : p.part[of].r + kBox;  // of a part's ranks
    issue(terms.rank_steps, [&](uint32_t stage, int) {
      left -= kBox;
      while (kBackward && left <= 0) left = p.part[of++].r;
      multiply_step(acc, stage, left);
    });
  }

  // What stayed out of low, of a thread's two rows. Of one level: rows with several have no room of one size.
  static __device__ void rooms_of_rows(float (&rooms)[2], const Part& part, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) rooms[i] = fused_lora::room(__ldg(part.scale + __ldg(&part.segments.rows[row + 8 * i].place)));
  }

  template <int kCount>
  static __device__ __forceinline__ void scale_rows(float (&acc)[kCount], const float2& by) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] *= i / 2 % 2 ? by.y : by.x;
  }

  // Of boxes those slices that some row's adapter has.
  __device__ __forceinline__ void issue_segments(float (&acc)[C::kBlockN / 2], int steps) {
    issue(steps, [&](uint32_t stage, int) { multiply_ranks(acc, stage, shared.ranks[ring.stage]); });
  }

  template <int kCount>
  __device__ __forceinline__ void multiply_ranks(float (&acc)[kCount], uint32_t stage, Ranks own) {
    constexpr bool kUp = kUpMN<C, kBackward>;
    const uint64_t lhs = descriptor<false>(stage + self.index * kBoxBytes) + own.first * kSlice<false>;
    const uint64_t rhs = descriptor<kUp>(stage + 2 * kBoxBytes) + own.first * kSlice<kUp>;
    multiply_slices<kSlices, kUp>(acc, lhs, rhs, own.count * work::kSlice);
  }

  __device__ __forceinline__ void multiply_step(float (&acc)[C::kBlockN / 2], uint32_t stage, int left) {
    const uint64_t lhs = descriptor<false>(stage + self.index * kBoxBytes), rhs = descriptor<kBackward>(stage + 2 * kBoxBytes);
    multiply_slices<kSlices>(acc, lhs, rhs, left);
  }

  // Of a gated tile: 64 columns at a time, which are one linear's, with sums of their own. Products in flight may not use parts
  // of each other's registers, and there are none for more columns.
  __device__ __forceinline__ void add_ranks(float (&acc)[C::kBlockN / 2]) {
    constexpr int kBoxes = C::kBlockN / kBox;
    const int first = p.part[0].r > 0 ? 0 : kBoxes / 2, last = p.part[1].r > 0 ? kBoxes : kBoxes / 2;
#pragma unroll 1
    for (int box = first; box < last; ++box) {
      float sum[kBox / 2] = {};
      multiply_boxes<boxes_of(C::kBlockR), C::kBlockR < kBox ? C::kBlockR / 16 : kSlices>(sum, await_stage(), 1);
      ptx::wgmma_wait<0>();
      release(ring.stage);
      ring.advance();
      if constexpr (kHasRoom<T>) scale_by(sum, room(p.part[box >= kBoxes / 2]));
#pragma unroll
      for (int b = 0; b < kBoxes; ++b) {
        if (b == box) add_box(acc, b, sum);
      }
    }
  }

  // The same of segments, by the slices that some row's adapter has.
  __device__ __forceinline__ void add_segments(float (&acc)[C::kBlockN / 2], int steps, int row) {
    constexpr int kBoxes = C::kBlockN / kBox;
#pragma unroll 1
    for (; steps > 0; --steps) {
      const uint32_t stage = await_stage();
      const Ranks own = shared.ranks[ring.stage];
      float sum[kBox / 2] = {};
      multiply_ranks(sum, stage, own);
      ptx::wgmma_wait<0>();
      release(ring.stage);
      ring.advance();
      if constexpr (kHasRoom<T>) {
        float rooms[2];
        rooms_of_rows(rooms, p.part[own.steps_or_of >= kBoxes / 2], row);
        scale_rows(sum, {rooms[0], rooms[1]});
      }
#pragma unroll
      for (int b = 0; b < kBoxes; ++b) {
        if (b == own.steps_or_of) add_box(acc, b, sum);
      }
    }
  }

  __device__ __forceinline__ void add_box(float (&acc)[C::kBlockN / 2], int box, const float (&sum)[kBox / 2]) {
#pragma unroll
    for (int i = 0; i < kBox / 2; ++i) acc[box * kBox / 2 + i] += sum[i];
  }

  // The columns of one of a gated tile's two linears.
  template <int kOf, int kCount>
  static __device__ __forceinline__ float (&half(float (&acc)[kCount]))[kCount / 2] {
    return reinterpret_cast<float(&)[kCount / 2]>(acc[kOf * kCount / 2]);
  }

  // With 16 more columns, which are low; it is multiplied from registers, and stored for the other tiles of these rows.
  __device__ __forceinline__ void multiply_riding(float (&acc)[C::kBlockN / 2], const Item& item) {
    float low[8] = {};
    const Part& part = p.part[0];  // a group of one alone rides
    consume(boxes_of(part.depth), [&](uint32_t stage, int) {
      const uint64_t lhs = descriptor<false>(stage + self.index * kBoxBytes), rhs = descriptor<false>(stage + 2 * kBoxBytes);
      const uint64_t down = descriptor<false>(stage + C::kTileBoxes * kBoxBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        ptx::wgmma<T, false, false>(acc, lhs + s * kSlice<false>, rhs + s * kSlice<false>);
        ptx::wgmma<T, false, false>(low, lhs + s * kSlice<false>, down + s * kSlice<false>);
      }
      ptx::wgmma_commit();
    });
    scale_by(low, low_scale(part));
    if constexpr (kHasRoom<T>) scale_by(acc, 1 / room(part));
    const uint32_t rounded[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(low[4], low[5]), pack<T>(low[6], low[7])};
    const uint64_t up = descriptor<false>(await_stage() + 2 * kBoxBytes);
    ptx::wgmma_fence();
    ptx::wgmma<T, false>(acc, rounded, up);
    ptx::wgmma_commit();
    store_riding_low(rounded, part, item);
    ptx::wgmma_wait<0>();
    if constexpr (kHasRoom<T>) scale_by(acc, room(part));
    release(ring.stage);
    ring.advance();
  }

  __device__ void store_riding_low(const uint32_t (&rounded)[4], const Part& part, const Item& item) {
    T* low = static_cast<T*>(part.low_data);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = own_row(item.row) + self.row() + i % 2 * 8;
      const int c = i / 2 * 8 + self.col();
      if (at < p.M && c < part.low_stride) *reinterpret_cast<uint32_t*>(low + at * part.low_stride + c) = rounded[i];
    }
    if (item.raises != work::kNone) outbox.raise(own_flag(item.raises), false);
  }

  // Each thread fetches one column in kWarpgroup for all: a thread has a quarter of all columns, and to fetch them one by one would
  // take as long as a sixth of a tile of depth 4,096.
  template <int kCount>
  __device__ __forceinline__ void finish_columns(float (&acc)[kCount], const Part& part, int first_col) {
    if (part.gain == nullptr && part.bias == nullptr) return;
    static_assert(2 * kCount % kWarpgroup == 0);
    const uint32_t columns = ptx::shared_address(shared.columns[self.index]);
#pragma unroll
    for (int first = 0; first < 2 * kCount; first += kWarpgroup) {
      const Column own = Column::of(part, min(first_col + first + self.thread(), part.cols - 1));
      self.sync();  // all have read what was there
      own.keep(columns + self.thread() * Column::kBytes);
      self.sync();
#pragma unroll
      for (int j = 0; j < kWarpgroup / 8; ++j) {
        ColumnPair::kept(columns + (8 * j + self.col()) * Column::kBytes).finish(acc + (first / 8 + j) * 4);
      }
    }
  }

  // ---- dA = dxa^T x, dB = gain dy^T xa, dbias = sum of dy, dgain = sum of dy (y - bias) / gain -------------------------------

  // Of each level at most the last window goes on in the next slice. Slices finish in their order, those that leave nothing too: what goes
  // on lies where that of all slices lies.
  __device__ __forceinline__ void gradient_segments(const Item& item) {
    const Part& of = p.part[item.part];
    keep_mark(item);
    outbox.send_flag();
#pragma unroll 1
    for (int level = 0; level < of.segments.levels; ++level) {
#pragma unroll 1
      for (Windows<C> windows(of.segments, level, item, p.M); windows.exist(); windows.advance()) gradient_window(item, of, windows);
    }
    const Chain<C, T> slice{p, of, self, of.dA, 0, item.raises | item.bits, own_flag(0)};
    if (slice.last()) return;
    slice.await_turn(ptx::shared_address(&shared.mark));
    outbox.send_all();
    outbox.hold_flag(slice.flag());
  }

  __device__ __forceinline__ void gradient_window(const Item& item, const Part& of, const Windows<C>& windows) {
    constexpr int kBlocks = C::kGradientBlocks;
    const bool of_A = item.work == Work::kGradientA;
    const Gradient& g = of_A ? of.dA : of.dB;
    const int first_col = item.col + (rank * kConsumers + self.index) * kBlocks * kBox;
    float acc[kBlocks][C::kBlockR / 2] = {};
    if (kDrops && of_A) {
      multiply_masked_window(acc, of, windows, first_col);
    } else {
      consume(windows.steps(), [&](uint32_t stage, int step) {
        keep_rows(stage, windows.first_own(step), windows.end_own(step));
        multiply_gradient(acc, stage);
      });
    }
    if constexpr (kHasRoom<T>) {
      if (!of_A) scale_ranks(acc, of, windows.rank() / work::kSlice);
    }
    outbox.empty();
    const Chain<C, T> chain{p, of, self, g, first_col, item.raises | windows.bits(), own_flag(0), windows.level};
    if (!chain.first() || !chain.last()) {
      const Chain<C, T> slice{p, of, self, g, first_col, item.raises | item.bits, own_flag(0)};
      slice.await_turn(ptx::shared_address(&shared.mark));
    }
    chain.add(acc);
    if (!chain.last()) return;
    const int first_rank = windows.index * C::kBlockR;
    if (g.copied) {
      outbox.keep_gradient(acc, g, first_col, first_rank);
    } else {
      chain.store(acc, first_rank);
    }
  }

  // By x where a row's adapter kept it, and by nothing of other windows' rows. The next step's thresholds are asked for before this one's
  // are used.
  __device__ __forceinline__ void multiply_masked_window(float (&acc)[C::kGradientBlocks][C::kBlockR / 2], const Part& of,
                                                         const Windows<C>& windows, int first_col) {
    outbox.empty();
    BoxMask<true> mask(mask_of(of, windows.level), self);
    int row = windows.first_step_row();
    const auto threshold_in = [&](int row) {
      const bool own = row >= windows.first_row() && row < windows.end_row();
      return own ? threshold_of(of.segments, windows.level, row) : Mask::kDropsAll;
    };
    uint32_t threshold = threshold_in(mask.row_of_lane(row));
    consume<false>(windows.steps(), [&](uint32_t stage, int) {
      mask.set_rows(row, threshold);
      row += kBox;
      threshold = threshold_in(mask.row_of_lane(row));
#pragma unroll
      for (int b = 0; b < C::kGradientBlocks; ++b) mask.apply(own_boxes(stage) + b * kBoxBytes, first_col + b * kBox);
      publish_shared();
      multiply_gradient(acc, stage);
    });
  }

  // Of this warpgroup's columns in a step, the rows from `first` to `end` alone: others may hold what is no number, times which 0
  // is none.
  __device__ __forceinline__ void keep_rows(uint32_t stage, int first, int end) const {
    if (first <= 0 && end >= kBox) return;
    constexpr int kChunks = C::kGradientBlocks * kBoxBytes / 16;
    for (int i = self.thread(); i < kChunks; i += kWarpgroup) {
      const int row = i / 8 % kBox;
      if (row < first || row >= end) ptx::store_shared(own_boxes(stage) + i * 16, uint4{});
    }
    publish_shared();
  }

  // By what stayed out of low, of each slice of ranks.
  static __device__ void scale_ranks(float (&acc)[C::kGradientBlocks][C::kBlockR / 2], const Part& of, int first) {
    const int last = of.segments.ranks / work::kSlice - 1;
#pragma unroll
    for (int slice = 0; slice < C::kBlockR / work::kSlice; ++slice) {
      const float room = fused_lora::room(__ldg(of.scale + min(first + slice, last)));
#pragma unroll
      for (auto& block : acc) {
#pragma unroll
        for (int i = 0; i < 8; ++i) block[8 * slice + i] *= room;
      }
    }
  }

  __device__ __forceinline__ void gradient(const Item& item) {
    if constexpr (C::kSegmented) return gradient_segments(item);
    constexpr int kBlocks = C::kGradientBlocks;
    const bool of_A = item.work == Work::kGradientA;
    const Part& of = p.part[item.part];
    const Gradient& g = of_A ? of.dA : of.dB;
    const int tokens = min(p.M - item.row, item.rows);
    const int turn = item.raises | item.bits, first_col = item.col + (rank * kConsumers + self.index) * kBlocks * kBox;
    outbox.send_flag();  // the first step may wait for it
    float acc[kBlocks][C::kBlockR / 2] = {};
    float sum = 0, product = 0;
    const int steps = boxes_of(tokens);
    const bool products = !of_A && of.dgain != nullptr;
    if (kDrops && of_A) {
      outbox.empty();
      BoxMask<> mask(Mask(of.dropout), self);
      consume<false>(steps, [&](uint32_t stage, int step) {
        mask.set_rows(item.row + step * kBox);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) mask.apply(own_boxes(stage) + b * kBoxBytes, first_col + b * kBox);
        publish_shared();
        multiply_gradient(acc, stage);
      });
    } else if (products) {
      outbox.empty();
      ColumnSums<C, T> columns(self);
      multiply_products(acc, columns, steps);
      sum = columns.sum();
      product = columns.product();
    } else if (g.sums != nullptr) {
      outbox.empty();
      ColumnSums<C, T> columns(self);
      consume<false>(steps, [&](uint32_t stage, int) {
        multiply_gradient(acc, stage);
        columns.add(own_boxes(stage));
      });
      sum = columns.sum();
    } else {
      consume(steps, [&](uint32_t stage, int) { multiply_gradient(acc, stage); });
    }
    if constexpr (kHasRoom<T>) {
      if (!of_A) {
        for (auto& block : acc) scale_by(block, room(of));
      }
    }
    if (!of_A && of.gain != nullptr) scale_rows(acc, of.gain, first_col, g.cols);
    outbox.empty();
    const Chain<C, T> chain{p, of, self, g, first_col, turn, own_flag(0)};
    chain.await_turn(ptx::shared_address(&shared.mark));
    if (products) {
      chain.add_sums(sum, product);
    } else if (g.sums != nullptr) {
      chain.add_sum(sum);
    }
    chain.add(acc);
    if (!chain.last()) return outbox.hold_flag(chain.flag());
    if (g.out == nullptr) return;
    if (g.copied) {
      outbox.keep_gradient(acc, g, first_col);
    } else {
      chain.store(acc);
    }
  }

  // A step's y lies in the stage behind that of its dy.
  __device__ __forceinline__ void multiply_products(float (&acc)[C::kGradientBlocks][C::kBlockR / 2], ColumnSums<C, T>& columns, int steps) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int first = ring.stage;
      const uint32_t dy = await_stage();
      ring.advance();
      multiply_gradient(acc, dy);
      columns.add(own_boxes(dy), own_boxes(await_stage()));
      ptx::wgmma_wait<0>();
      release(first);
      release(ring.stage);
      ring.advance();
    }
  }

  // A gradient's rows are columns of y.
  __device__ __forceinline__ void scale_rows(float (&acc)[C::kGradientBlocks][C::kBlockR / 2], const float* gain, int first_col, int cols) {
#pragma unroll
    for (int b = 0; b < C::kGradientBlocks; ++b) {
      const int c = first_col + b * kBox + self.row();
      const float own[2] = {gain[min(c, cols - 1)], gain[min(c + 8, cols - 1)]};
#pragma unroll
      for (int i = 0; i < C::kBlockR / 2; ++i) acc[b][i] *= own[i / 2 % 2];
    }
  }

  __device__ uint32_t own_boxes(uint32_t stage) const { return stage + self.index * C::kGradientBlocks * kBoxBytes; }

  __device__ __forceinline__ void multiply_gradient(float (&acc)[C::kGradientBlocks][C::kBlockR / 2], uint32_t stage) {
    const uint64_t low = descriptor<true>(stage + C::kGradientCols / kBox * kBoxBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int b = 0; b < C::kGradientBlocks; ++b) {
      const uint64_t big = descriptor<true>(own_boxes(stage) + b * kBoxBytes);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) ptx::wgmma<T, true, true>(acc[b], big + s * kSlice<true>, low + s * kSlice<true>);
    }
    ptx::wgmma_commit();
  }
};

}  // namespace fused_lora::sm90
