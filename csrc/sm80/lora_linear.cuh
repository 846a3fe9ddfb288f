// One pass of the LoRA linear in one launch: a persistent block an SM, all of whose warps copy, multiply and store. docs/sm80.md
// tells its story.
#pragma once

#include "beside.cuh"
#include "gating.cuh"
#include "loader.cuh"
#include "masked.cuh"

namespace fused_lora::sm80 {

template <int kStages, int kBlockR, typename T, bool kBackward, bool kDrops, bool kGated, bool kSegmented>
struct Worker {
  using Tile = Product<T, 4, 4, false, kBackward>;
  using Low = Product<T, 2, kBlockR / 16, false, kBackward && !kSegmented>;  // a slab's ranks are its rows
  using Grad = Product<T, 2, kBlockR / 16, true, true>;

  using Memory = typename Loader<kStages, kBackward, kGated && !kBackward, kSegmented>::Memory;

  Memory& shared;
  const KernelParams& p;
  static constexpr bool kGates = kGated && !kBackward, kGateGrads = kGated && kBackward;
  // Of a tile of gate and up, the columns of one.
  template <int kWhich>
  using Side = Product<T, 4, 2, false, false, 4, 2 * kWhich>;

  Loader<kStages, kBackward, kGates, kSegmented> loader{shared, p};
  uint32_t source = 0;  // the stage that is multiplied next

  Sums sums;
  float total;  // of a gradient's column, over tokens

  // Whether the columns' own sums are wanted, with the first ranks.
  __device__ bool adds_up(const Item& item) const {
    return item.work == Work::kGradientB && item.rank == 0 && p.part[item.part].dB.sums != nullptr;
  }

  __device__ __forceinline__ void run() {
    for (int number = 0;; ++number) {
      loader.serve_if_needed();
      if (loader.head_of(number).work == Work::kEnd) return;
      clear();
      if constexpr (kSegmented) {
        if (loader.head_of(number).work != Work::kTile) {
          run_segments(number);
          continue;
        }
      }
      multiply_item(number);
      finish(number);
    }
  }

  // What is known of an item is read again after its products: while they run, registers are scarce.
  __device__ __forceinline__ void multiply_item(int number) {
    const Item& item = loader.at(number);
    const Head head = loader.head_of(number);
    const Work work = head.work;
    const Dropout& dropout = p.part[head.part].dropout;
    const int steps = loader.steps_of(number);
    if (work == Work::kShrink) {
      if constexpr (kDrops && !kBackward) {
        const int first = loader.depth_of(head, head.part).first;
        multiply<Low>(sums, steps, warp() * 32, 0, StepMask<false>(dropout, item.row, first, steps));
      } else multiply<Low>(sums, steps, warp() * 32, 0, Nothing());
    } else if (!kBackward || work == Work::kTile) {
      multiply_tile(item, head, steps, number);
    } else if constexpr (kBackward && !kGated) {
      if (kDrops && work == Work::kGradientA) {
        multiply<Grad>(sums, steps, warp() * 32, 0, StepMask<true>(dropout, item.row, item.col, steps));
      } else if (uniform(adds_up(item))) {
        multiply<Grad>(sums, steps, warp() * 32, 0, ColumnSums<T>{total});
      } else {
        multiply<Grad>(sums, steps, warp() * 32, 0, Nothing());
      }
    }
  }

  // Of slabs, whose ranks are rows.
  using TileOfSlab = Product<T, 4, 4, false, true>;

  __device__ __forceinline__ void multiply_segmented_tile(const Item& item, int steps, int number) {
    if constexpr (kBackward) return multiply<Tile>(sums, steps, tile_row(), tile_col(), Nothing());
    const int depth = loader.steps_before_ranks(number);
    multiply_part<Tile>(sums, depth, tile_col(), Nothing());
    const bool makes_room = kMakesRoom && steps > depth;  // behind a branch, or it begins among the products before it
    if (makes_room) scale_rows(item, [](float room) { return 1 / room; });
    multiply_part<TileOfSlab>(sums, steps - depth, tile_col(), Nothing());
    if (makes_room) scale_rows(item, [](float room) { return room; });
  }

  // By what stayed out of low, of each row's adapter: they are of one level.
  template <typename Of>
  __device__ __forceinline__ void scale_rows(const Item& item, Of of) {
    const Part& part = p.part[uniform(item.part)];
    const work::Row* rows = part.segments.rows + item.row + tile_row() + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float by = of(room(__ldg(part.scale + __ldg(&rows[i * 16 + half * 8].place))));
#pragma unroll
        for (int j = 0; j < 2 * Tile::kCols; ++j) {
          Tile::of(sums, i, j)[2 * half] *= by;
          Tile::of(sums, i, j)[2 * half + 1] *= by;
        }
      }
    }
  }

  // A shrink or gradient item, window by window.
  __device__ __forceinline__ void run_segments(int number) {
#pragma unroll 1
    for (bool first = true;; first = false) {
      __syncthreads();  // all have read the one before
      if (threadIdx.x == 0) runs::find_window(p, loader.at(number), shared.steps[number % kSlots], shared.window, first);
      __syncthreads();
      if (!shared.window.exists) break;
      clear();
      const int steps = uniform(shared.window.steps);
      if (loader.head_of(number).work == Work::kShrink) {
        multiply_run<Low>(steps);
        if (!shared.window.is_nothing) store_low(number);
      } else if constexpr (kBackward) {
        if (steps > 0) multiply_run<Grad>(steps);
        if (!shared.window.is_nothing) finish_window(number);
      }
    }
    const Item& item = loader.at(number);
    const bool shrinks = loader.head_of(number).work == Work::kShrink;
    if (!shrinks && uniform(item.bits) & work::kLast) return;
    if (!shrinks) await_slice_before(item);
    raise(item.raises);
  }

  // Slices finish in their order, those that leave nothing too: what goes on in the next one lies where that of all slices lies.
  __device__ __forceinline__ void await_slice_before(const Item& item) const {
    if (uniform(item.bits) & work::kFirst) return;
    if (threadIdx.x == 0) ptx::flag_wait(p.flags + item.raises - p.chain_flags, shared.mark);
    __syncthreads();
  }

  template <typename P>
  __device__ __forceinline__ void multiply_run(int steps) {
    loader.serve_if_needed();
    multiply<P>(sums, steps, warp() * 32, 0, Nothing());
  }

  // Of a window the ranks of each row's own adapter, by its own scale.
  __device__ __forceinline__ void store_low(int number) {
    const Item& item = loader.at(number);
    const Part& part = p.part[uniform(item.part)];
    const int first = (shared.window.at * p.rank + item.rank) / work::kSlice, row = item.row + warp() * 32 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2 * Low::kRows; ++i) {
      const auto scale_of = [](float scale) { return kMakesRoom ? scale / room(scale) : scale; };
      const RowRanks own(part.segments, part.scale, shared.window.level, row + i * 8, scale_of);
#pragma unroll
      for (int j = 0; j < 2 * Low::kCols; ++j) {
        float(&four)[4] = Low::of(sums, i / 2, j);
        four[i % 2 * 2] = own.choose(four[i % 2 * 2], first + j / 2);
        four[i % 2 * 2 + 1] = own.choose(four[i % 2 * 2 + 1], first + j / 2);
      }
    }
    store_rows<T, Low>(sums, slab(), loader.low_at(part.low, shared.window.low_row), warp() * 32, 0, kSegmentRows, kLowBox);
  }

  // Its sums may go on in the next slice, which waits for them. Each level has sums of its own.
  __device__ __forceinline__ void finish_window(int number) {
    const Item& item = loader.at(number);
    const bool of_A = loader.head_of(number).work == Work::kGradientA;
    const Part& part = p.part[uniform(item.part)];
    const Gradient& g = of_A ? part.dA : part.dB;
    float* partial = g.partial + (int64_t{item.col} * part.segments.levels + shared.window.level * kBlockM) * p.rank + item.rank * kBlockM;
    const int bits = uniform(shared.window.bits);
    if (kHasRoom<T> && !of_A) scale_ranks(part, shared.window.slice);
    if (bits != (work::kFirst | work::kLast)) await_slice_before(item);
    if (!(bits & work::kFirst)) add_sums<kGradSums>(sums, partial);
    if (!(bits & work::kLast)) return keep_sums<kGradSums>(sums, partial);
    const int first = shared.window.at * p.rank + item.rank;
    store_gradient(item, g, first, first + kBlockR);
  }

  // By what stayed out of low, of each slice of ranks.
  __device__ __forceinline__ void scale_ranks(const Part& part, int first) {
    const int last = part.segments.ranks / work::kSlice - 1;
#pragma unroll
    for (int slice = 0; slice < Grad::kCols; ++slice) {
      const float by = room(__ldg(part.scale + min(first + slice, last)));
#pragma unroll
      for (int i = 0; i < Grad::kRows; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) Grad::of(sums, i, 2 * slice + k / 4)[k % 4] *= by;
      }
    }
  }

  __device__ __forceinline__ void multiply_tile(const Item& item, const Head& head, int steps, int number) {
    if constexpr (kSegmented) return multiply_segmented_tile(item, steps, number);
    if constexpr (!kMasksRanks && !kMakesRoom && !kGates) return multiply<Tile>(sums, steps, tile_row(), tile_col(), Nothing());
    const int depth = loader.steps_before_ranks(number);
    if constexpr (kMasksRanks) {
      multiply_masked(item, depth, steps - depth);
    } else {
#pragma unroll 1
      for (int i = 0; i < (kGates ? 1 : 2); ++i) {
        multiply_part<Tile>(sums, i == 0 ? depth : steps - depth, tile_col(), Nothing());
        if (kMakesRoom && i == 0 && depth > 0) make_room(item);  // behind a branch, or it begins among the products before it
      }
    }
    if constexpr (kGates) {
      const int gates = head.has_ranks() ? steps_of(p.part[0].r) : 0;
      multiply_part<Side<0>>(sums, gates, tile_col(), Nothing());
      multiply_part<Side<1>>(sums, steps - depth - gates, tile_col() + 32, Nothing());
    }
  }

  __device__ __forceinline__ void multiply_masked(const Item& item, int depth, int ranks) {
    const int drawn = ranks > 0 ? min(depth, KeptSums<Tile>::kDraws) : 0;
    multiply_part<Tile>(sums, depth - drawn, tile_col(), Nothing());
    if (ranks == 0) return;
    KeptSums<Tile> kept(sums, p.part[0].dropout, item.row + tile_row(), item.col + tile_col());  // the summed ones' x is one
    multiply_part<Tile>(sums, drawn, tile_col(), kept);
    kept.draw_rest();
    multiply_part<MaskedProduct<Tile>>(kept, ranks, tile_col(), Nothing());
  }

  // Steps of a tile, if there are any.
  template <typename P, typename Into, typename Beside>
  __device__ __forceinline__ void multiply_part(Into& into, int steps, int col, Beside&& beside) {
    if (steps == 0) return;
    loader.serve_if_needed();
    multiply<P>(into, steps, tile_row(), col, beside);
  }

  static __device__ int warp() { return threadIdx.x / 32; }

  __device__ void clear() {
#pragma unroll
    for (auto& four : sums.of) {
#pragma unroll
      for (float& sum : four) sum = 0;
    }
    total = 0;
  }

  // Steps of the stages from `source` on; each copies one. The loader goes on meanwhile, while the fragments stay.
  template <typename P, typename Into, typename Beside>
  __device__ __forceinline__ void multiply(Into& into, int steps, int row, int col, Beside&& beside) {
    beside.begin(loader.stages() + source);
    P product(loader.stages() + source, row, col);
    product.read(0, 0);
#pragma unroll 1
    for (;;) {
      const int count = min(steps, min(loader.free_steps(), loader.quiet_steps()));
      multiply_steps(product, into, count, beside);
      loader.advance(count);
      loader.look_ahead();
      steps -= count;
      if (steps == 0) return;  // what it made may be what the loader waits for
      if (loader.free_steps() > 0) continue;
      const bool empty = loader.ahead == 0;
      loader.serve();
      if (empty) product.read(0, 0);
    }
  }

  template <typename P, typename Into, typename Beside>
  __device__ __forceinline__ void multiply_steps(P& product, Into& into, int steps, Beside& beside) {
#pragma unroll 1
    for (; steps > 0; --steps) {
      loader.aim(source);
      product.read(1, 1);
      beside.see(loader.stages() + source);
      const int further = loader.to_next(source);
      source += further;
      product.move(further);
      product.template multiply<0, P::kRows / 2>(into, 0);
      loader.copy();
      product.template multiply<P::kRows / 2, P::kRows>(into, 0);
      ptx::async_copies_wait<kStages - 2>();
      beside.change(loader.stages() + source);
      __syncthreads();
      product.read(0, 0);
      product.template multiply<0, P::kRows>(into, 1);
    }
  }

  // The same, some columns after the others, which read the stage's fragments themselves: the product moves on behind them.
  template <typename P>
  __device__ __forceinline__ void multiply_steps(MaskedProduct<P>& product, KeptSums<P>& into, int steps, Nothing&) {
#pragma unroll 1
    for (; steps > 0; --steps) {
      loader.aim(source);
      const int further = loader.to_next(source);
      source += further;
      product.multiply_columns(into, 0);
      loader.copy();
      product.multiply_columns(into, product.kAtOnce);
      product.move(further);
      ptx::async_copies_wait<kStages - 2>();
      __syncthreads();
    }
  }

  // With dropout, a tile's ranks add to its sums where x was kept; forward in float16, the sums over depth make room for ranks that
  // are made without the scale's power of two.
  static constexpr bool kMasksRanks = kBackward && kDrops, kMakesRoom = kHasRoom<T> && !kBackward;

  __device__ __forceinline__ void make_room(const Item& item) {
    if constexpr (kGates) {
      scale_by<Side<0>>(sums, 1 / room(*p.part[0].scale));
      scale_by<Side<1>>(sums, 1 / room(*p.part[1].scale));
    } else {
      scale_by<Tile>(sums, 1 / room(*p.part[uniform(item.part)].scale));
    }
  }
  static __device__ int tile_row() { return warp() % 4 * 64; }
  static __device__ int tile_col() { return warp() / 4 * 64; }

  // This warp's share of the stage that was multiplied last. The next step's copies come there, behind a barrier.
  __device__ __forceinline__ uint32_t slab() const {
    const uint32_t last = source == 0 ? (kStages - 1) * kStageBytes : source - kStageBytes;
    return loader.stages() + last + warp() * kSlabBytes;
  }

  __device__ __forceinline__ void finish(int number) {
    const Item& item = loader.at(number);
    const Head head = loader.head_of(number);
    const Part& part = p.part[head.part];
    const Work work = head.work;
    if (head.is_half()) {
      const int flag = p.half_flags + item.half;
      float* half = p.half_sums + int64_t{item.half} * (kBlockM * kBlockN);
      if (head.is_first()) return keep<kAllSums>(half, flag);
      add<kAllSums>(half, flag);
    }
    if (work == Work::kShrink) {
      scale_by<Low>(sums, part.dropout.keep_scale * (kMakesRoom ? *part.scale / room(*part.scale) : *part.scale));
      store_rows<T, Low>(sums, slab(), part.low, item.row + warp() * 32, loader.first_rank(head, item), p.M, part.r);
      raise(item.raises);
    } else if (kBackward && !kGated && work != Work::kTile) {
      finish_gradient(item, work == Work::kGradientA ? part.dA : part.dB, part.r);
    } else {
      finish_tile(part, item.row + tile_row(), item.col + (kGates ? tile_col() / 2 : tile_col()));
    }
  }

  __device__ __forceinline__ void finish_tile(const Part& part, int row, int col) {
    if constexpr (kGates) {
      finish_side<Side<0>>(p.part[0], col);
      finish_side<Side<1>>(p.part[1], col);
    } else if constexpr (!kBackward) {
      finish_side<Tile>(part, col);
    }
    if constexpr (kGated) {
      in_form<kGateGrads>(p.gated, [&](auto form) { gate_rows<T, Tile, kGateGrads, decltype(form)>(sums, slab(), p.gated, row, col, p.M, part.cols); });
    } else {
      store_rows<T, Tile>(sums, slab(), part.out, row, col, p.M, part.cols);
    }
    __syncthreads();
  }

  template <typename P>
  __device__ __forceinline__ void finish_side(const Part& part, int col) {
    if constexpr (kMakesRoom && !kSegmented) scale_by<P>(sums, room(*part.scale));
    finish_columns<P>(sums, slab(), part, col);
  }

  __device__ __forceinline__ void finish_gradient(const Item& item, const Gradient& g, int r) {
    float* partial = g.partial + int64_t{item.col} * p.rank + item.rank * kBlockM;
    const int bits = uniform(item.bits);
    if (kHasRoom<T> && item.work == Work::kGradientB) scale_by<Grad>(sums, room(*p.part[item.part].scale));
    if (!(bits & work::kFirst)) add<kGradSums>(partial, item.raises - p.chain_flags);
    if (uniform(adds_up(item))) finish_total(item, g, p.part[item.part].bias_dtype);
    if (bits & work::kLast) return store_gradient(item, g, item.rank, r);
    keep<kGradSums>(partial, item.raises);
  }
  static constexpr int kGradSums = Grad::kRows * 2 * Grad::kCols;

  // What several items sum up is added in order, so that the bits are always the same: each adds to what the one before left, and
  // the last one has the whole sum.
  template <int kCount>
  __device__ __forceinline__ void add(const float* before, int flag) {
    if (threadIdx.x == 0) ptx::flag_wait(p.flags + flag, shared.mark);
    __syncthreads();
    add_sums<kCount>(sums, before);
  }
  template <int kCount>
  __device__ __forceinline__ void keep(float* target, int flag) {
    keep_sums<kCount>(sums, target);
    raise(flag);
  }

  // The columns' own sums.
  __device__ __forceinline__ void finish_total(const Item& item, const Gradient& g, DType dtype) {
    const int col = item.col + threadIdx.x;
    if (!(item.bits & work::kFirst)) total += __ldcg(g.sums_partial + col);
    if (!(item.bits & work::kLast)) {
      __stcg(g.sums_partial + col, total);
    } else if (col < g.cols) {
      store_as(g.sums, dtype, col, total);
    }
  }

  // The sums of ranks from `first` on, as far as there are `r`.
  __device__ __forceinline__ void store_gradient(const Item& item, const Gradient& g, int first, int r) const {
    if (g.out == nullptr) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kGradSums; ++i) {
      const int col = item.col + warp() * 32 + i / (2 * Grad::kCols) * 16 + lane / 4;
      const int rank = first + i % (2 * Grad::kCols) * 8 + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int c = col + k / 2 * 8, own = rank + k % 2;
        if (c < g.cols && own < r) store_as(g.out, p.factor_dtype, c * g.stride_col + own * g.stride_rank, sums.of[i][k]);
      }
    }
  }

  // Tells other blocks that what this one wrote is there.
  __device__ void raise(int flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      ptx::flag_raise(p.flags + flag, shared.mark);
    }
  }
};

template <int kStages, int kBlockR, typename T, bool kBackward, bool kDrops, bool kGated, bool kSegmented>
__device__ __forceinline__ void run_kernel(const KernelParams& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  using Own = Worker<kStages, kBlockR, T, kBackward, kDrops, kGated, kSegmented>;
  auto& shared = *reinterpret_cast<typename Own::Memory*>(memory);
  if (threadIdx.x == 0) shared.mark = p.counters->launches + 1;
  __syncthreads();
  Own{shared, p}.run();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&p.counters->exited, 1) + 1 == static_cast<int>(gridDim.x)) *p.counters = {shared.mark};
  }
}

#ifdef __CUDA_ARCH__
constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
constexpr int kCapability = 90;
#endif

template <int kStages, int kBlockR, typename T, bool kBackward, bool kDrops, bool kGated, bool kSegmented>
__global__ void __launch_bounds__(kThreads, 1) lora_linear_kernel(const __grid_constant__ KernelParams p) {
  if constexpr (has_kernels(kStages, kCapability)) run_kernel<kStages, kBlockR, T, kBackward, kDrops, kGated, kSegmented>(p);
}

}  // namespace fused_lora::sm80
