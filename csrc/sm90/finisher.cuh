// Two warps that neither load nor multiply. They take the boxes of a tile out of shared memory where the copy engine cannot: they
// gate them, or store rows that start anywhere. In between the products, these instructions would stop them.
#pragma once

#include "../ptx/cp_async.cuh"
#include "dequantiser.cuh"

namespace fused_lora::sm90 {

// A thread's share of a box of 64 x 64, of kThreads: each kThreads-th of its 512 chunks of 8 elements, counted along rows.
template <int kThreads>
struct Chunks {
  static constexpr int kCount = kBox * kBox / 8 / kThreads, kRows = kThreads / 8;  // kRows: from one chunk to the next
  static_assert(kRows % 8 == 0, "the swizzle is the same in all rows of a thread");

  int64_t offset;  // of the first one's elements
  int rows;        // from its row on, that are in the matrices

  __device__ Chunks(const KernelParams& p, int row, int col) {
    row += thread() / 8;
    col += thread() % 8 * 8;
    offset = row * p.gated.stride + col;
    rows = col < p.part[0].cols ? p.M - row : 0;
  }

  static __device__ int thread() { return threadIdx.x % kThreads; }
  static __device__ uint32_t in_box(int i) { return i * kRows * 128 + swizzled(thread() / 8, thread() % 8); }
  __device__ bool has(int i) const { return i * kRows < rows; }
  __device__ int64_t at(const KernelParams& p, int i) const { return offset + i * kRows * p.gated.stride; }
};

// Where box n of a tile comes from and goes to: from one warpgroup and the other in turn.
struct BoxOf {
  int warpgroup, row, col;
  __device__ BoxOf(const int4& tile, int n)
      : warpgroup(n % kConsumers), row(tile.x + warpgroup * kBox), col(tile.y + n / kConsumers * kBox) {}
};

template <typename C, typename T, typename F>
struct GateBoxes {
  using Own = Chunks<kFinishThreads>;
  using Does = Gate<T, F, C::kGateGrads>;
  static constexpr int kTogether = 2;  // chunks, whose chains of instructions hide each other's latencies
  static_assert(Own::kCount == kGateAhead, "what lies ahead is a box");

  Shared<C>& shared;
  const KernelParams& p;
  const Does gate{p.gated};

  __device__ Own chunks(const int4& tile, int n) const {
    const BoxOf box(tile, n);
    return Own(p, n == C::kFinishBoxes ? p.M : box.row, box.col);
  }

  __device__ void begin(const int4& tile) const {
    const Own own = chunks(tile, 0);
#pragma unroll 1
    for (int i = 0; i < Own::kCount; i += kTogether) fetch(own, i);
  }

  // Gate and up of the next box are on their way from memory meanwhile.
  __device__ __forceinline__ void finish(const int4& tile, int n, uint32_t box) const {
    const Own own = chunks(tile, n), next = chunks(tile, n + 1);
#pragma unroll(C::kGateGrads && F::kFactors ? Own::kCount : 1)
    for (int i = 0; i < Own::kCount; i += kTogether) {
      uint4 v[kTogether][Does::kOperands], hidden[kTogether];
      if constexpr (C::kGateGrads) ptx::async_copies_wait<kGateAhead / kTogether - 1>();
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        v[t][0] = ptx::load_shared(box + Own::in_box(i + t));
        v[t][1] = ptx::load_shared(C::kGateGrads ? ahead(i + t, 0) : box + kBoxBytes + Own::in_box(i + t));
        if constexpr (C::kGateGrads) v[t][2] = ptx::load_shared(ahead(i + t, 1));
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) gate.turn(v[t], hidden[t]);
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (own.has(i + t)) gate.store(v[t], hidden[t], own.at(p, i + t));
      }
      fetch(next, i);
    }
  }

  // Each thread fetches what it reads itself.
  __device__ uint32_t ahead(int i, int which) const { return ptx::shared_address(&shared.gate_ahead[i][which][Own::thread()]); }
  __device__ __forceinline__ void fetch(const Own& own, int first) const {
    if constexpr (C::kGateGrads) {
#pragma unroll
      for (int i = first; i < first + kTogether; ++i) {
        if (!own.has(i)) continue;
        ptx::async_copy_16(ahead(i, 0), gate.at(p.gated.gate, own.at(p, i)));
        ptx::async_copy_16(ahead(i, 1), gate.at(p.gated.up, own.at(p, i)));
      }
      ptx::async_copies_commit();
    }
  }
};

// 8 of the elements of two neighbouring chunks, from element 2 kWords + bits / 16 on.
template <int kWords>
__device__ __forceinline__ uint4 between(const uint4& a, const uint4& b, int bits) {
  const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  const uint32_t* w = words + kWords;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// A box of an out whose rows start anywhere. Rows i, i + 8, ... start at the same place between multiples of 16 bytes; a warp
// stores four of them at once. In between come 7 accesses of 16 bytes, before and after them 8 elements.
template <int kThreads>
__device__ __forceinline__ void store_whole_rows(const KernelParams& p, const Part& part, int row, int col, uint32_t box) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x % kThreads / 32, lane = threadIdx.x % 32, chunk = lane % 8;
  const int rest = lane / 8 * 8 + warp % 2 * 32;
#pragma unroll 1
  for (int eighth = warp / 2; eighth < 8; eighth += kWarps / 2) {
    const int r = eighth + rest, before = -eighth * part.cols & 7;  // elements before the first multiple of 16 bytes
    const uint32_t from = box + r * 128;
    const uint4 a = ptx::load_shared(from + ((chunk ^ eighth) << 4)), b = ptx::load_shared(from + (((chunk + 1) % 8 ^ eighth) << 4));
    const int edge = chunk < before ? chunk : chunk + kBox - 8;
    const uint16_t value = ptx::load_shared_16(from + ((edge / 8 ^ eighth) << 4) + edge % 8 * 2);
    if (row + r >= p.M) continue;
    uint16_t* out = part.out_data + int64_t{row + r} * part.cols + col;
    out[edge] = value;
    if (chunk == 7) continue;
    uint4* to = reinterpret_cast<uint4*>(out + before) + chunk;
    const int bits = before % 2 * 16;
    switch (before / 2) {
      case 0: *to = between<0>(a, b, bits); break;
      case 1: *to = between<1>(a, b, bits); break;
      case 2: *to = between<2>(a, b, bits); break;
      default: *to = between<3>(a, b, bits); break;
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void store_rows(const KernelParams& p, const Part& part, int row, int col, uint32_t box) {
  if (col + kBox <= part.cols) return store_whole_rows<kThreads>(p, part, row, col, box);
  const int c = threadIdx.x % kBox;
  for (int r = threadIdx.x % kThreads / kBox; r < min(kBox, p.M - row) && col + c < part.cols; r += kThreads / kBox) {
    part.out_data[int64_t{row + r} * part.cols + col + c] = ptx::load_shared_16(box + swizzled(r, c / 8) + c % 8 * 2);
  }
}

template <typename C>
struct StoreRows {
  const KernelParams& p;
  __device__ void begin(const int4&) const {}
  __device__ __forceinline__ void finish(const int4& tile, int n, uint32_t box) const {
    const BoxOf of(tile, n);
    store_rows<kFinishThreads>(p, p.part[tile.z], of.row, of.col, box);
  }
};

template <typename C, typename Boxes>
__device__ __forceinline__ void finish_tiles(Shared<C>& shared, const Boxes& boxes) {
  uint32_t full_phase = 0;
  for (uint32_t phase = 0;; phase ^= 1) {
    ptx::mbarrier_wait(&shared.finish_tile_full, phase);
    const int4 tile = shared.finish_tile;
    if (tile.x < 0) return;
    boxes.begin(tile);
#pragma unroll 1
    for (int n = 0; n < C::kFinishBoxes; ++n) {
      const int w = n % kConsumers;
      ptx::mbarrier_wait(&shared.finish_full[w], full_phase);
      boxes.finish(tile, n, ptx::shared_address(shared.out[w]));
      ptx::mbarrier_arrive(&shared.finish_empty[w]);
      if (w + 1 == kConsumers) full_phase ^= 1;
    }
  }
}

// The same, with pieces of weights that are dequantised while no box comes; also where none ever does (`finishes`).
template <typename C, typename Boxes, typename Pieces>
__device__ __forceinline__ void finish_tiles_beside(Shared<C>& shared, const Boxes& boxes, Pieces pieces, bool finishes) {
  uint32_t tile_phase = 0, full_phase = 0;
  int4 tile{};
  int n = C::kFinishBoxes;  // the next box of the tile
  pieces.take();
  while (finishes || !pieces.done()) {
    const bool begins = n == C::kFinishBoxes;
    uint64_t* barrier = begins ? &shared.finish_tile_full : &shared.finish_full[n % kConsumers];
    if (!finishes || !__all_sync(~0u, ptx::mbarrier_is_over(barrier, begins ? tile_phase : full_phase))) {
      if (!pieces.work()) __nanosleep(finishes ? 50 : 500);
    } else if (begins) {
      tile = shared.finish_tile;
      tile_phase ^= 1;
      n = 0;
      finishes = tile.x >= 0;
      if (finishes) boxes.begin(tile);
    } else {
      const int w = n % kConsumers;
      boxes.finish(tile, n++, ptx::shared_address(shared.out[w]));
      ptx::mbarrier_arrive(&shared.finish_empty[w]);
      if (w + 1 == kConsumers) full_phase ^= 1;
    }
  }
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.dequantised);
}

template <typename C, typename T, bool kBackward, typename Boxes>
__device__ __forceinline__ void run_finisher(Shared<C>& shared, const KernelParams& p, const Boxes& boxes, bool finishes) {
  if constexpr (C::kStored) return finish_tiles_beside<C>(shared, boxes, Dequantiser<T, kBackward, C::kGates>(p), finishes);
  if (finishes) finish_tiles<C>(shared, boxes);
}

template <typename C, typename T, bool kBackward>
__device__ void run_finisher(Shared<C>& shared, const KernelParams& p) {
  if constexpr (C::kGated) {
    in_form<C::kGateGrads>(p.gated, [&](auto form) { run_finisher<C, T, kBackward>(shared, p, GateBoxes<C, T, decltype(form)>{shared, p}, true); });
  } else {
    run_finisher<C, T, kBackward>(shared, p, StoreRows<C>{p}, p.rows_start_anywhere);
  }
}

}  // namespace fused_lora::sm90
