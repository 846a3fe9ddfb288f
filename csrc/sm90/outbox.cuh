// Results on their way out of a warpgroup while it multiplies the next item: one part after each step, so that neither the
// tensor cores nor the stages wait for a tile's 64 kB to be stored.
#pragma once

#include "finisher.cuh"
#include "fragments.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "warpgroup.cuh"

namespace fused_lora::sm90 {

template <typename C, typename T>
struct Outbox {
  static constexpr int kMostBoxes = C::kBlockN / kBox;
  static constexpr int kFlagParts = 2;
  static constexpr bool kGated = C::kGated;
  static constexpr int kOutBoxes = C::kTileCols / kBox;

  Shared<C>& shared;
  const KernelParams& p;
  const Warpgroup self;

  // Parts: boxes of 64 x 64 in 16 registers each, for the finisher with steps between them; where somebody waits for the result, a
  // step in which its bytes arrive, and its flag.
  uint32_t boxes[kMostBoxes][16];
  int map;                   // where among the parameters: half a pointer, since registers are scarce
  int first_row, first_col;  // in the map's matrix
  int what;                  // part of the group whose tile goes to the finisher, or one of these
  static constexpr int kOut = -1, kLow = -2, kGradient = -3, kTransposed = -4;  // the last is a gradient, of which registers hold columns
  int flag = work::kNone;    // among the launch's
  int next_part = 0, box_count = 0, parts = 0;
  int pause = 0;  // steps until the finisher may take the next box
  uint32_t finish_phase = 1;  // of finish_empty, which ends when the finisher has given back the last box

  // A 64 x 2 kCount result for (row, col) of the map's matrix. What was pending goes out before.
  template <int kCount>
  __device__ __forceinline__ void keep(const float (&acc)[kCount], const CUtensorMap* of, int row, int col, int raise_when_out) {
    send_all();
    pack_boxes<0>(acc);
    address(of, row, col, kLow);
    hold(boxes_of(2 * kCount), raise_when_out);
  }

  template <int kCount>
  __device__ __forceinline__ void keep_out(const float (&acc)[kCount], int part, int row, int col) {
    keep(acc, &p.part[part].out, row, col, work::kNone);
    what = kGated || p.part[part].out_data != nullptr ? part : kOut;
    if (!to_finisher()) return;
    parts = kOutBoxes;
    pause = self.index * p.finish_spacing / 2;
  }

  // 64 kBlocks columns of a factor's gradient, which is dA^T or dB.
  template <int kBlocks>
  __device__ __forceinline__ void keep_gradient(const float (&acc)[kBlocks][C::kBlockR / 2], const Gradient& g, int col, int rank = 0) {
    const bool of_A = g.stride_col == 1;
    pack_boxes<0>(acc[0]);
    if constexpr (kBlocks == 2) pack_boxes<boxes_of(C::kBlockR)>(acc[1]);
    address(&g.result, of_A ? rank : col, of_A ? col : rank, of_A ? kTransposed : kGradient);
    hold(kBlocks * boxes_of(C::kBlockR), work::kNone);
  }

  template <int kFirstBox, int kCount>
  __device__ __forceinline__ void pack_boxes(const float (&acc)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) boxes[kFirstBox + i / 16][i % 16] = pack<T>(acc[2 * i], acc[2 * i + 1]);
  }

  __device__ __forceinline__ void address(const CUtensorMap* of, int row, int col, int is) {
    map = static_cast<int>(reinterpret_cast<const char*>(of) - reinterpret_cast<const char*>(&p));
    first_row = row;
    first_col = col;
    what = is;
  }

  __device__ __forceinline__ void hold(int count, int raise_when_out) {
    next_part = 0;
    box_count = count;
    flag = raise_when_out;
    parts = count + (flag == work::kNone ? 0 : kFlagParts);
  }

  __device__ __forceinline__ void hold_flag(int raise) {
    what = kLow;
    hold(0, raise);
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
    if (flag != work::kNone) send_all();
  }

  __device__ __forceinline__ void send_part() {
    if (to_finisher()) {
      if (--pause >= 0) return;
      send_to_finisher(next_part);
      pause = p.finish_spacing - 1;
    } else if (next_part < box_count) {
      const uint32_t buffer = ptx::shared_address(shared.out[self.index]);
      await_buffer();
      write_box(next_part, buffer);
      publish_buffer();
      if (self.thread() == 0) copy_out(buffer, next_part);
    } else if (next_part + 1 == parts) {
      raise(flag, box_count > 0);
    }
    ++next_part;
  }

  // Until what left it last has been read.
  __device__ __forceinline__ void await_buffer() const {
    if (self.thread() == 0) ptx::tma_store_wait_read<0>();
    if (kGated || p.rows_start_anywhere) ptx::mbarrier_wait(&shared.finish_empty[self.index], finish_phase);
    self.sync();
  }

  // One box of a tile, of a gated forward one both halves'.
  __device__ __forceinline__ void send_to_finisher(int box) {
    const uint32_t buffer = ptx::shared_address(shared.out[self.index]);
    await_buffer();
    write_box(box, buffer);
    if constexpr (C::kGates) write_box(box + kOutBoxes, buffer + kBoxBytes);
    if (box == 0) announce(first_row, first_col, what);
    finish_phase ^= 1;
    ptx::mbarrier_arrive(&shared.finish_full[self.index]);
  }

  // A tile that the copy engine cannot store.
  __device__ __forceinline__ bool to_finisher() const { return what >= 0; }

  // The finisher has read where the tile before is: it has given back boxes of it.
  __device__ __forceinline__ void announce(int row, int col, int part) {
    const uint4 tile = {static_cast<uint32_t>(row), static_cast<uint32_t>(col), static_cast<uint32_t>(part), 0};
    if (self.thread() == 0 && self.index == 0) {
      ptx::store_shared(ptx::shared_address(&shared.finish_tile), tile);
      ptx::mbarrier_arrive(&shared.finish_tile_full);
    }
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

  // Boxes lie side by side, but for those of a gradient: boxes_of(r) for each 64 of its columns.
  __device__ __forceinline__ void copy_out(uint32_t buffer, int box) {
    const int ranks = boxes_of(C::kBlockR), across = box / ranks * kBox, along = box % ranks * kBox;
    const bool stacked = C::kSegmented && what == kLow;  // each box of low has all rows of a block
    const int row = first_row + (stacked ? box * kPairRows : what > kGradient ? 0 : what == kTransposed ? along : across);
    const int col = first_col + (stacked ? 0 : what > kGradient ? box * kBox : what == kTransposed ? across : along);
    ptx::tma_store(reinterpret_cast<const CUtensorMap*>(reinterpret_cast<const char*>(&p) + map), row, col, buffer);
    ptx::tma_store_commit();
  }

  // Tells readers in other blocks that what this warpgroup wrote is there: by copies, which are one thread's, or by everybody.
  __device__ void raise(int raised, bool copied) {
    if (!copied) {
      __threadfence();
      self.sync();
    }
    if (self.thread() == 0) {
      ptx::tma_store_wait();
      ptx::fence_async_global();
      ptx::flag_raise(p.flags + raised, ptx::load_shared_32(ptx::shared_address(&shared.mark)));
    }
  }

  // After the last item. A whole tile goes out at once through stages, which nothing fills any more.
  __device__ void finish() {
    if (next_part == 0 && parts > 0 && what >= kOut) {
      ptx::named_barrier(3, kConsumers * kWarpgroup);
      const uint32_t buffers = ptx::shared_address(shared.stages[self.index]);
      write_boxes<0>(buffers);
      publish_buffer();
      finish_tile(buffers);
    } else {
      send_all();
    }
    ptx::tma_store_wait_read<0>();
    if (kGated || p.rows_start_anywhere) announce(-1, 0, 0);
  }

  __device__ __forceinline__ void finish_tile(uint32_t buffers) {
    if constexpr (kGated) {
      in_form<C::kGateGrads>(p.gated, [&](auto form) { gate_tile<decltype(form)>(buffers); });
    } else if (to_finisher()) {
      for (int box = 0; box < kOutBoxes; ++box) {
        store_rows<kWarpgroup>(p, p.part[what], first_row, first_col + box * kBox, buffers + box * kBoxBytes);
      }
    } else if (self.thread() < kOutBoxes) {
      copy_out(buffers + self.thread() * kBoxBytes, self.thread());
    }
  }

  template <typename F>
  __device__ __forceinline__ void gate_tile(uint32_t buffers) {
    using Own = Chunks<kWarpgroup>;
    const Gate<T, F, C::kGateGrads> gate{p.gated};
#pragma unroll(Own::kCount)
    for (int n = 0; n < kOutBoxes * Own::kCount; ++n) {
      const int box = n / Own::kCount, i = n % Own::kCount;
      const Own own(p, first_row, first_col + box * kBox);
      if (!own.has(i)) continue;
      const uint32_t from = buffers + box * kBoxBytes + Own::in_box(i);
      const int64_t at = own.at(p, i);
      uint4 v[gate.kOperands] = {ptx::load_shared(from)}, hidden;
      if constexpr (C::kGateGrads) {
        v[1] = __ldcg(gate.at(p.gated.gate, at));
        v[2] = __ldcg(gate.at(p.gated.up, at));
      } else {
        v[1] = ptx::load_shared(from + kOutBoxes * kBoxBytes);
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
