// What becomes of the tiles of act(gate) up and of its gradient, on their way out of a warpgroup. The work on a box is done half by
// half, and the two warpgroups of a block do it at different times, so that the tensor cores always have products to do.
#pragma once

#include "activation.cuh"
#include "params.cuh"
#include "pipeline.cuh"

namespace fused_lora::sm90 {

template <typename C, typename T, Epilogue = C::kEpilogue>
struct Gate;

// act(gate) up, whose boxes are made of the two halves of a tile's columns; then gate and up themselves, where they are wanted.
template <typename C, typename T>
struct Gate<C, T, Epilogue::kGate> {
  using Out = Outbox<C, T>;
  static constexpr int kHidden = Out::kMostBoxes / 2, kHiddenParts = 2 * kHidden, kDelay = kHiddenParts;
  static constexpr int kBoxesAtOnce = kHidden + Out::kMostBoxes;

  static __device__ int parts(const Gated& gated) { return kHiddenParts + (gated.wants_sides ? Out::kMostBoxes : 0); }

  static __device__ __forceinline__ void send(Out& out, int part) {
    const uint32_t buffer = ptx::shared_address(out.shared.out[out.self.index]);
    const bool second = part < kHiddenParts && part % 2 == 1;
    if (!second) out.await_buffer();
    if (part >= kHiddenParts) {
      out.write_box(part - kHiddenParts, buffer);
    } else {
      write_hidden(out, part / 2, second, buffer);
      if (!second) return;
    }
    out.publish_buffer();
    if (out.self.thread() == 0) copy(out, part < kHiddenParts ? part / 2 : part - kHiddenParts + kHidden, buffer);
  }

  // Boxes are those of act(gate) up, of gate and of up.
  static __device__ __forceinline__ void copy(const Out& out, int box, uint32_t buffer) {
    const KernelParams& p = out.p;
    const CUtensorMap* to = box < kHidden ? &p.gated.hidden : box < 2 * kHidden ? &p.part[0].out : &p.part[1].out;
    ptx::tma_store(to, out.first_row, out.first_col + box % kHidden * kBox, buffer);
    ptx::tma_store_commit();
  }

  static __device__ __forceinline__ void write_hidden(const Out& out, int box, bool second, uint32_t buffer) {
    switch (2 * box + second) {
      case 0: return write_hidden<0, 0>(out, buffer);
      case 1: return write_hidden<0, 1>(out, buffer);
      case 2: return write_hidden<1, 0>(out, buffer);
      default: return write_hidden<1, 1>(out, buffer);
    }
  }

  template <int kIndex, int kSecond>
  static __device__ __forceinline__ void write_hidden(const Out& out, uint32_t buffer) {
    const Act act(out.p.gated.activation);
    const uint32_t(&gate)[16] = out.boxes[kIndex], (&up)[16] = out.boxes[kHidden + kIndex];
#pragma unroll
    for (int j = 2 * kSecond; j < 2 * kSecond + 2; ++j) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = act.hidden<T>(gate[4 * j + i], up[4 * j + i]);
      ptx::stmatrix(buffer + out.own_chunk(j), pairs);
    }
  }

  static __device__ void send_at_once(Out& out, uint32_t buffers) {
    for (int box = 0; box < kHidden; ++box) {
      for (int second = 0; second < 2; ++second) write_hidden(out, box, second, buffers + box * kBoxBytes);
    }
    const int boxes = out.p.gated.wants_sides ? kBoxesAtOnce : kHidden;
    for (int box = kHidden; box < boxes; ++box) out.write_box(box - kHidden, buffers + box * kBoxBytes);
    out.publish_buffer();
    if (out.self.thread() < boxes) copy(out, out.self.thread(), buffers + out.self.thread() * kBoxBytes);
  }
};

// The gradient of act(gate) up. Boxes of gate and up are fetched; some steps later their gradients take their places and go out,
// and the box becomes act(gate) up, which goes out next where it is wanted.
template <typename C, typename T>
struct Gate<C, T, Epilogue::kGateGrad> {
  using Out = Outbox<C, T>;
  static constexpr int kFetch = 0, kFirstHalf = 3, kSecondHalf = 4, kHidden = 5, kDelay = 2;
  static constexpr int kBoxesAtOnce = 3 * Out::kMostBoxes;

  static __device__ int parts_of_box(const Gated& gated) { return gated.wants_hidden ? kHidden + 1 : kHidden; }
  static __device__ int parts(const Gated& gated) { return Out::kMostBoxes * parts_of_box(gated); }

  static __device__ __forceinline__ void send(Out& out, int next_part) {
    const int per_box = parts_of_box(out.p.gated), box = next_part / per_box, part = next_part % per_box;
    const uint32_t buffer = ptx::shared_address(out.shared.out[out.self.index]);
    if (part == kFetch) {
      if (out.self.thread() == 0) {
        ptx::tma_store_wait_read<0>();
        ptx::mbarrier_arrive_expect_tx(full(out), 2 * kBoxBytes);
        fetch(out, box, buffer);
      }
    } else if (part == kFirstHalf) {
      ptx::mbarrier_wait(full(out), box % 2);  // a tile has an even number of them
      turn(out, box, false, buffer);
    } else if (part == kSecondHalf) {
      turn(out, box, true, buffer);
      out.publish_buffer();
      if (out.self.thread() == 0) copy(out, box, buffer);
    } else if (part == kHidden) {
      out.await_buffer();
      out.write_box(box, buffer);
      out.publish_buffer();
      if (out.self.thread() == 0) copy_hidden(out, box, buffer);
    }
  }

  static __device__ uint64_t* full(const Out& out) { return &out.shared.gate_full[out.self.index]; }

  static __device__ __forceinline__ void fetch(const Out& out, int box, uint32_t buffer) {
    const int row = out.first_row, col = out.first_col + box * kBox;
    ptx::tma_load(buffer, &out.p.gated.gate, row, col, full(out));
    ptx::tma_load(buffer + kBoxBytes, &out.p.gated.up, row, col, full(out));
  }

  static __device__ __forceinline__ void copy(const Out& out, int box, uint32_t buffer) {
    const int row = out.first_row, col = out.first_col + box * kBox;
    ptx::tma_store(&out.p.gated.dgate, row, col, buffer);
    ptx::tma_store(&out.p.gated.dup, row, col, buffer + kBoxBytes);
    ptx::tma_store_commit();
  }

  static __device__ __forceinline__ void copy_hidden(const Out& out, int box, uint32_t buffer) {
    ptx::tma_store(&out.p.gated.hidden, out.first_row, out.first_col + box * kBox, buffer);
    ptx::tma_store_commit();
  }

  static __device__ __forceinline__ void turn(Out& out, int box, bool second, uint32_t buffer) {
    switch (2 * box + second) {
      case 0: return turn<0, 0>(out, buffer);
      case 1: return turn<0, 1>(out, buffer);
      case 2: return turn<1, 0>(out, buffer);
      case 3: return turn<1, 1>(out, buffer);
      case 4: return turn<2, 0>(out, buffer);
      case 5: return turn<2, 1>(out, buffer);
      case 6: return turn<3, 0>(out, buffer);
      default: return turn<3, 1>(out, buffer);
    }
  }

  template <int kIndex, int kSecond>
  static __device__ __forceinline__ void turn(Out& out, uint32_t buffer) {
    const Act act(out.p.gated.activation);
    const uint32_t own = buffer + swizzled(out.self.row(), 0) + out.self.col() * 2;
#pragma unroll
    for (int i = 8 * kSecond; i < 8 * kSecond + 8; ++i) {
      const uint32_t at = (own ^ i / 2 << 4) + i % 2 * 8 * 128;
      uint32_t gate = ptx::load_shared_32(at), up = ptx::load_shared_32(at + kBoxBytes);
      act.turn<T>(out.boxes[kIndex][i], gate, up);
      ptx::store_shared_32(at, gate);
      ptx::store_shared_32(at + kBoxBytes, up);
    }
  }

  static __device__ void send_at_once(Out& out, uint32_t buffers) {
    constexpr int kBoxes = Out::kMostBoxes;
    if (out.self.thread() == 0) {
      ptx::mbarrier_arrive_expect_tx(full(out), kBoxes * 2 * kBoxBytes);
      for (int box = 0; box < kBoxes; ++box) fetch(out, box, buffers + 2 * box * kBoxBytes);
    }
    ptx::mbarrier_wait(full(out), 0);
    for (int box = 0; box < kBoxes; ++box) {
      for (int second = 0; second < 2; ++second) turn(out, box, second, buffers + 2 * box * kBoxBytes);
      if (out.p.gated.wants_hidden) out.write_box(box, buffers + (2 * kBoxes + box) * kBoxBytes);
    }
    out.publish_buffer();
    const int box = out.self.thread();
    if (box >= kBoxes) return;
    copy(out, box, buffers + 2 * box * kBoxBytes);
    if (out.p.gated.wants_hidden) copy_hidden(out, box, buffers + (2 * kBoxes + box) * kBoxBytes);
  }
};

}  // namespace fused_lora::sm90
