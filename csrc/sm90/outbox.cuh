// Results on their way out of a warpgroup while it multiplies the next item: one part after each step, so that neither the
// tensor cores nor the stages wait for a tile's 64 kB to be stored.
#pragma once

#include "fragments.cuh"
#include "gated.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "warpgroup.cuh"

namespace fused_lora::sm90 {

template <typename C, typename T>
struct Outbox {
  static constexpr int kMostBoxes = C::kBlockN / kBox;
  static constexpr int kFlagParts = 2;
  static constexpr bool kGated = C::kEpilogue != Epilogue::kPlain;
  static constexpr int kTileBoxes = C::kTileCols / kBox;

  Shared<C>& shared;
  const KernelParams& p;
  const Warpgroup self;

  // Parts: boxes of 64 x 64 in 16 registers each, or what gated boxes go through; where somebody waits for the result, a step in
  // which its bytes arrive, and its flag.
  uint32_t boxes[kMostBoxes][16];
  const CUtensorMap* map;
  int first_row, first_col;  // in the map's matrix
  int what;                  // part of the group whose out it is, or one of these
  static constexpr int kLow = -1, kGradient = -2, kTransposed = -3;  // the last is a gradient, of which registers hold columns
  int* flag = nullptr;
  int next_part = 0, box_count = 0, parts = 0;
  int gated_boxes = 0;  // that were left to be gated

  // A 64 x 2 kCount result for (row, col) of the map's matrix. What was pending goes out before.
  template <int kCount>
  __device__ __forceinline__ void keep(const float (&acc)[kCount], const CUtensorMap* of, int row, int col, int* raise_when_out) {
    send_all();
    pack_boxes<0>(acc);
    address(of, row, col, kLow);
    hold(boxes_of(2 * kCount), raise_when_out);
  }

  template <int kCount>
  __device__ __forceinline__ void keep_out(const float (&acc)[kCount], int part, int row, int col) {
    keep(acc, &p.part[part].out, row, col, nullptr);
    what = part;
    if constexpr (kGated) {
      parts = (kTileBoxes - 1) * p.schedule.gate_spacing + 1;
      next_part = -self.index * p.schedule.gate_spacing / 2;
    }
  }

  // 64 kBlocks columns of a factor's gradient, which is dA^T or dB.
  template <int kBlocks>
  __device__ __forceinline__ void keep_gradient(const float (&acc)[kBlocks][C::kBlockR / 2], const Gradient& g, int col) {
    const bool of_A = g.stride_col == 1;
    pack_boxes<0>(acc[0]);
    if constexpr (kBlocks == 2) pack_boxes<boxes_of(C::kBlockR)>(acc[1]);
    address(&g.result, of_A ? 0 : col, of_A ? col : 0, of_A ? kTransposed : kGradient);
    hold(kBlocks * boxes_of(C::kBlockR), nullptr);
  }

  template <int kFirstBox, int kCount>
  __device__ __forceinline__ void pack_boxes(const float (&acc)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) boxes[kFirstBox + i / 16][i % 16] = pack<T>(acc[2 * i], acc[2 * i + 1]);
  }

  __device__ __forceinline__ void address(const CUtensorMap* of, int row, int col, int is) {
    map = of;
    first_row = row;
    first_col = col;
    what = is;
  }

  __device__ __forceinline__ void hold(int count, int* raise_when_out) {
    next_part = 0;
    box_count = count;
    flag = raise_when_out;
    parts = count + (flag == nullptr ? 0 : kFlagParts);
  }

  __device__ __forceinline__ bool pending() const { return next_part < parts; }

  __device__ __forceinline__ void send_all() {
    while (pending()) send_part();
  }

  // The same, and tells the compiler that the registers are free.
  __device__ __forceinline__ void empty() {
    send_all();
#pragma unroll
    for (auto& box : boxes) {
#pragma unroll
      for (uint32_t& pair : box) pair = 0;
    }
  }

  __device__ __forceinline__ void send_boxes() {
    while (next_part < box_count) send_part();
  }

  // Before steps that may wait for a flag which is still pending here.
  __device__ __forceinline__ void send_flag() {
    if (flag != nullptr) send_all();
  }

  __device__ __forceinline__ void send_part() {
    if (kGated && what >= 0) {
      if constexpr (kGated) {
        if (next_part >= 0 && next_part % p.schedule.gate_spacing == 0) send_to_gate(next_part / p.schedule.gate_spacing);
      }
    } else if (next_part < box_count) {
      const uint32_t buffer = ptx::shared_address(shared.out[self.index]);
      await_buffer();
      write_box(next_part, buffer);
      publish_buffer();
      if (by_hand()) {
        store_box(buffer, first_row, first_col + next_part * kBox);
      } else if (self.thread() == 0) {
        copy_out(buffer, next_part);
      }
    } else if (next_part + 1 == parts) {
      raise(flag, box_count > 0);
    }
    ++next_part;
  }

  // Until what left it last has been read.
  __device__ __forceinline__ void await_buffer() const {
    if (self.thread() == 0) ptx::tma_store_wait_read<0>();
    if (kGated && gated_boxes > 0) ptx::mbarrier_wait(&shared.gate_empty[self.index], (gated_boxes - 1) % 2);
    self.sync();
  }

  // One box of a tile, forward its two halves' both.
  __device__ __forceinline__ void send_to_gate(int box) {
    const uint32_t buffer = ptx::shared_address(shared.out[self.index]);
    await_buffer();
    write_box(box, buffer);
    if constexpr (C::kGates) write_box(box + kTileBoxes, buffer + kBoxBytes);
    if (box == 0) announce(first_row, first_col);
    ptx::mbarrier_arrive(&shared.gate_full[self.index]);
    ++gated_boxes;
  }

  // Whoever gates has read where the tile before is: it has given back boxes of it.
  __device__ void announce(int row, int col) {
    if (self.index > 0 || self.thread() > 0) return;
    shared.gate_tile = {row, col};
    ptx::mbarrier_arrive(&shared.gate_tile_full);
  }

  // What the warpgroup wrote there is seen by copies.
  __device__ __forceinline__ void publish_buffer() const {
    ptx::fence_async_shared();
    self.sync();
  }

  // Where the matrices of a box's registers 4 j to 4 j + 3 lie in shared memory: this lane's row of them.
  __device__ __forceinline__ uint32_t own_chunk(int j) const {
    return swizzled(self.thread() / 32 * 16 + self.lane() / 8 % 2 * 8 + self.lane() % 8, 2 * j + self.lane() / 16);
  }

  // A box to shared memory, its 16-byte chunks where the 128-byte swizzle has them.
  __device__ __forceinline__ void write_box(int box, uint32_t buffer) {
    switch (box) {
      case 0: return write_box<0>(buffer);
      case 1: return write_box<1 % kMostBoxes>(buffer);
      case 2: return write_box<2 % kMostBoxes>(buffer);
      default: return write_box<3 % kMostBoxes>(buffer);
    }
  }

  template <int kBoxIndex>
  __device__ __forceinline__ void write_box(uint32_t buffer) {
    const int warp = self.thread() / 32, low_bit = self.lane() / 8 % 2, high_bit = self.lane() / 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t(&v)[16] = boxes[kBoxIndex];
      const uint32_t pairs[4] = {v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]};
      if (what == kTransposed) {
        const int row = 16 * j + 8 * high_bit + self.lane() % 8, chunk = 2 * warp + low_bit;
        ptx::stmatrix_transposed(buffer + swizzled(row, chunk), pairs);
      } else {
        ptx::stmatrix(buffer + own_chunk(j), pairs);
      }
    }
  }

  __device__ __forceinline__ bool by_hand() const { return !kGated && what >= 0 && p.part[what].out_data != nullptr; }

  // A box of out, from shared memory to rows that start anywhere: two at a time, an element a thread.
  __device__ __forceinline__ void store_box(uint32_t buffer, int row, int col) const {
    const int c = self.thread() % kBox, cols = p.part[what].cols;
    if (col + c >= cols) return;
    uint16_t* out = p.part[what].out_data + col + c;
#pragma unroll 8
    for (int i = self.thread() / kBox; i < kBox; i += kWarpgroup / kBox) {
      const uint16_t value = ptx::load_shared_16(buffer + swizzled(i, c / 8) + c % 8 * 2);
      if (row + i < p.M) out[int64_t{row + i} * cols] = value;
    }
  }

  // Boxes lie side by side, but for those of a gradient: boxes_of(r) for each 64 of its columns.
  __device__ __forceinline__ void copy_out(uint32_t buffer, int box) {
    const int ranks = boxes_of(C::kBlockR), across = box / ranks * kBox, along = box % ranks * kBox;
    const int row = first_row + (what > kGradient ? 0 : what == kTransposed ? along : across);
    const int col = first_col + (what > kGradient ? box * kBox : what == kTransposed ? across : along);
    ptx::tma_store(map, row, col, buffer);
    ptx::tma_store_commit();
  }

  // Tells readers in other blocks that what this warpgroup wrote is there: by copies, which are one thread's, or by everybody.
  __device__ void raise(int* raised, bool copied) {
    if (!copied) {
      __threadfence();
      self.sync();
    }
    if (self.thread() == 0) {
      ptx::tma_store_wait();
      ptx::fence_async_global();
      ptx::flag_add_release(raised, 1);
    }
  }

  // After the last item. A whole tile goes out at once through stages, which nothing fills any more.
  __device__ void finish() {
    const bool whole = next_part <= 0 && parts > 0 && what >= 0;
    if (whole && kGated) {
      if constexpr (kGated) in_form<C>(p.gated, [&](auto form) { gate_at_once<form.value>(); });
    } else if (whole && box_count == kMostBoxes && !by_hand()) {
      ptx::named_barrier(3, kConsumers * kWarpgroup);
      const uint32_t buffers = ptx::shared_address(shared.stages[self.index]);
      write_boxes<0>(buffers);
      publish_buffer();
      if (self.thread() < parts) copy_out(buffers + self.thread() * kBoxBytes, self.thread());
    } else {
      send_all();
    }
    ptx::tma_store_wait_read<0>();
    if (kGated) announce(-1, 0);
  }

  template <Form kForm>
  __device__ void gate_at_once() {
    ptx::named_barrier(3, kConsumers * kWarpgroup);
    const uint32_t buffers = ptx::shared_address(shared.stages[self.index]);
    write_boxes<0>(buffers);
    self.sync();
    using Own = Chunks<C, kWarpgroup>;
    const Gate<C, T, kForm> gate{p};
#pragma unroll(Own::kCount)
    for (int n = 0; n < kTileBoxes * Own::kCount; ++n) {
      const int box = n / Own::kCount, i = n % Own::kCount;
      const Own chunks(p, first_row, first_col + box * kBox);
      if (!chunks.has(i)) continue;
      const uint32_t from = buffers + box * kBoxBytes + Own::in_box(i);
      const int64_t at = chunks.at(p, i);
      uint4 v[gate.kOperands] = {ptx::load_shared(from)}, hidden;
      if constexpr (C::kGateGrads) {
        v[1] = __ldcg(gate.at(p.gated.gate, at));
        v[2] = __ldcg(gate.at(p.gated.up, at));
      } else {
        v[1] = ptx::load_shared(from + kTileBoxes * kBoxBytes);
      }
      gate.turn(v, hidden);
      gate.store(v, hidden, at);
    }
  }

  template <int kFirst>
  __device__ __forceinline__ void write_boxes(uint32_t buffers) {
    write_box<kFirst>(buffers + kFirst * kBoxBytes);
    if constexpr (kFirst + 1 < kMostBoxes) write_boxes<kFirst + 1>(buffers);
  }
};

}  // namespace fused_lora::sm90
