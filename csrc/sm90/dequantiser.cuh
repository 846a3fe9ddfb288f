// The warps that finish tiles have time: beside the products they dequantise weights in a format, a piece at a time (work/ring.h).
#pragma once

#include "../dequantise.cuh"
#include "params.cuh"
#include "pipeline.cuh"

namespace fused_lora::sm90 {

// Of one warp.
template <typename T, bool kBackward, bool kGates>
struct Dequantiser {
  const KernelParams& p;
  const int mark;
  int piece = 0;

  __device__ explicit Dequantiser(const KernelParams& params) : p(params), mark(params.counters->launches + 1) { take(); }

  __device__ bool done() const { return piece >= p.ring.pieces; }

  // A piece, if there is one and its place is free.
  __device__ __forceinline__ bool work() {
    if (done() || !is_free()) return false;
    dequantise();
    take();
    return true;
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }
  __device__ int column() const { return piece / p.ring.of_tile; }

  __device__ void take() {
    if (lane() == 0) piece = atomicAdd(&p.counters->dequantised, 1);
    piece = __shfl_sync(~0u, piece, 0);
  }

  // Whether all tiles have read what was there before.
  __device__ bool is_free() const {
    const int before = column() - p.ring.tiles;
    if (before < 0) return true;
    const int* flags = p.flags + p.ring.done + 2 * before * p.ring.rows;
    bool read = true;
    for (int row = lane(); row < p.ring.rows; row += 32) {
      const int2 own = ptx::load_flag_pair(flags + 2 * row);
      read &= own.x == mark && own.y == mark;
    }
    if (!__all_sync(~0u, read)) return false;
    ptx::acquire();
    return true;
  }

  // Which weight's rows and columns, and where they go.
  __device__ __forceinline__ void dequantise() const {
    int along = piece % p.ring.of_tile / p.ring.across, part = 0, col = column();
    const int across = piece % p.ring.across, place = col % p.ring.tiles * p.ring.across + across;
    if constexpr (kBackward) {
      for (int own; along >= (own = pieces_of(p.part[part].depth)); ++part) along -= own;
      col = col * p.ring.across + across;
      write(p.part[part], along, col, along, place);
    } else {
      int row;
      if constexpr (kGates) {
        part = across * 2 / p.ring.across;
        row = col * (p.ring.across / 2) + across % (p.ring.across / 2);
      } else {
        for (int own; col >= (own = ceil_div(p.part[part].cols, p.ring.across * work::kPieceSize)); ++part) col -= own;
        row = col * p.ring.across + across;
      }
      write(p.part[part], row, along, place, along);
    }
    ptx::fence_async_global();
    __syncwarp();
    if (lane() == 0) ptx::flag_raise(p.flags + p.ring.ready + column() * p.ring.ready_stride + piece % p.ring.of_tile, mark);
  }

  static __device__ int pieces_of(int depth) { return ceil_div(depth, work::kPieceSize); }

  // In pieces: row and column of W, and of the ring.
  __device__ __forceinline__ void write(const Part& part, int row, int col, int to_row, int to_col) const {
    if (!part.stored.exists()) return;
    const int rows = min(work::kPieceSize, (kBackward ? part.depth : part.cols) - row * work::kPieceSize);
    const int cols = min(work::kPieceSize, static_cast<int>(part.stored.cols) - col * work::kPieceSize);
    uint16_t* to = part.ring + (to_row * p.ring_stride + to_col) * work::kPieceSize;
    in_format(part.stored.format, [&](auto format) {
      constexpr Format kFormat = decltype(format)::value;
      const float nf4 = kIsNf4<kFormat> ? nf4_value(lane()) : 0;
      if (part.stored.aligned) {
        write_eights<kFormat>(part.stored, row * work::kPieceSize, col * work::kPieceSize, rows, cols, to, nf4);
      } else {
        write_entries<kFormat>(part.stored, row * work::kPieceSize, col * work::kPieceSize, rows, cols, to, nf4);
      }
    });
  }

  // Two rows at once, 16 bytes a lane. What some lanes have not is read from where others read it.
  template <Format kFormat>
  __device__ __forceinline__ void write_eights(const Stored& w, int first_row, int first_col, int rows, int cols, uint16_t* to, float nf4) const {
    constexpr int kTogether = 2;
    const int own_row = lane() / 16, own_col = lane() % 16 * 8;
    const bool reads = own_col < cols;
    EightCodes<kFormat, T> codes(w, first_row + own_row, first_col + (reads ? own_col : 0), nf4);
    uint4* target = reinterpret_cast<uint4*>(to + own_row * p.ring_stride + own_col);
    int left = rows - own_row;
#pragma unroll 1
    for (int row = 0; row < rows; row += 2 * kTogether) {
      typename EightCodes<kFormat, T>::Loaded loaded[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (2 * i < left) loaded[i] = codes.next(w);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const uint4 eight = codes.made_of(loaded[i]);
        if (2 * i < left && reads) ptx::store_global(target, eight);
        target += p.ring_stride / 4;
      }
      left -= 2 * kTogether;
    }
  }

  // Where rows start anywhere.
  template <Format kFormat>
  __device__ __forceinline__ void write_entries(const Stored& w, int first_row, int first_col, int rows, int cols, uint16_t* to, float nf4) const {
#pragma unroll 1
    for (int i = lane(); i < rows * work::kPieceSize; i += 32) {  // as often in all lanes
      const int row = i / work::kPieceSize, col = i % work::kPieceSize;
      const float value = entry_of<kFormat>(w, first_row + row, first_col + (col < cols ? col : 0), nf4);
      const uint32_t pair = pack<T>(value, value);
      if (col < cols) to[row * p.ring_stride + col] = static_cast<uint16_t>(pair);
    }
  }
};

}  // namespace fused_lora::sm90
