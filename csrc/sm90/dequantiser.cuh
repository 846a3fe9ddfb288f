// Weights in a format are dequantised a piece at a time (work/ring.h): what the ring has room for at first by all warps,
// the rest beside the products by those that finish tiles.
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
  uint32_t asked = 0;  // when its place was not free

  __device__ explicit Dequantiser(const KernelParams& params) : p(params), mark(params.counters->launches + 1) {}

  __device__ bool done() const { return piece >= p.ring.pieces; }

  // What an empty ring has room for, and nobody waits for anything.
  __device__ void fill() {
    for (;;) {
      piece = taken(&p.counters->filled);
      if (piece >= first_pieces()) return;
      prefetch();
      dequantise();
    }
  }

  // The next one, whose codes are on their way into the L2 cache then.
  __device__ void take() {
    piece = taken(&p.counters->filled);
    if (piece >= first_pieces()) piece = first_pieces() + taken(&p.counters->refilled);
    if (!done()) prefetch();
  }

  // The piece, if its place is free. All warps that wait ask for the same flags: without pauses that slows the copies of tiles.
  __device__ __forceinline__ bool work() {
    constexpr uint32_t kPause = 2000;  // cycles
    if (done() || (asked != 0 && ptx::clock() - asked < kPause)) return false;
    if (!is_free()) {
      asked = ptx::clock() | 1;
      return false;
    }
    asked = 0;
    dequantise();
    take();
    return true;
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int pieces_of(int depth) { return ceil_div(depth, work::kPieceRows); }
  __device__ int column() const { return piece / p.ring.of_tile; }
  __device__ int first_pieces() const { return min(p.ring.pieces, p.ring.tiles * p.ring.of_tile); }

  static __device__ int taken(int* counter) {
    int number = 0;
    if (lane() == 0) number = atomicAdd(counter, 1);
    return __shfl_sync(~0u, number, 0);
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

  // Which weight's rows and columns, and where they go in the ring; all in pieces.
  struct Place {
    int part, row, col, to_row, to_col;
  };
  __device__ __forceinline__ Place place() const {
    int along = piece % p.ring.of_tile / p.ring.across, part = 0, col = column();
    const int across = piece % p.ring.across, to = col % p.ring.tiles * p.ring.across + across;
    if constexpr (kBackward) {
      for (int own; along >= (own = pieces_of(p.part[part].depth)); ++part) along -= own;
      return {part, along, col * p.ring.across + across, along, to};
    } else if constexpr (kGates) {
      const int half = p.ring.across / 2;
      return {across / half, col * half + across % half, along, to, along};
    } else {
      for (int own; col >= (own = ceil_div(p.part[part].cols, p.ring.across * work::kPieceRows)); ++part) col -= own;
      return {part, col * p.ring.across + across, along, to, along};
    }
  }

  // Of a piece's rows and columns those that the weight has.
  struct Extent {
    int first_row, first_col, rows, cols;
    __device__ Extent(const Part& part, const Place& place)
        : first_row(place.row * work::kPieceRows),
          first_col(place.col * work::kPieceCols),
          rows(min(work::kPieceRows, (kBackward ? part.depth : part.cols) - first_row)),
          cols(min(work::kPieceCols, static_cast<int>(part.stored.cols) - first_col)) {}
  };

  __device__ void prefetch() const {
    const Place at = place();
    const Part& part = p.part[at.part];
    if (!part.stored.exists()) return;
    const Extent own(part, at);
    const bool half = part.stored.format == Format::kNf4 || part.stored.format == Format::kNestedNf4;
    for (int row = lane(); row < own.rows && own.cols > 0; row += 32) {
      const int64_t code = (own.first_row + row) * part.stored.cols + own.first_col;
      ptx::prefetch(static_cast<const uint8_t*>(part.stored.codes) + (half ? code / 2 : code));
    }
  }

  __device__ __forceinline__ void dequantise() const {
    const Place at = place();
    const Part& part = p.part[at.part];
    if (part.stored.exists()) {
      uint16_t* to = part.ring + at.to_row * work::kPieceRows * p.ring_stride + at.to_col * work::kPieceCols;
      write(part.stored, Extent(part, at), to);
    }
    ptx::fence_async_global();
    __syncwarp();
    if (lane() == 0) ptx::flag_raise(p.flags + p.ring.ready + column() * p.ring.ready_stride + piece % p.ring.of_tile, mark);
  }

  __device__ __forceinline__ void write(const Stored& w, const Extent& own, uint16_t* to) const {
    in_format(w.format, [&](auto format) {
      constexpr Format kFormat = decltype(format)::value;
      const float nf4 = kIsNf4<kFormat> ? nf4_value(lane()) : 0;
      if (w.aligned) {
        write_eights<kFormat>(w, own, to, nf4);
      } else {
        write_entries<kFormat>(w, own, to, nf4);
      }
    });
  }

  // Two rows at once, 16 bytes a lane, and some of these together, while the next ones are on their way. What some lanes have not is
  // read from where others read it.
  template <Format kFormat>
  __device__ __forceinline__ void write_eights(const Stored& w, const Extent& own, uint16_t* to, float nf4) const {
    using Codes = EightCodes<kFormat, T>;
    constexpr int kTogether = 3;
    const int own_row = lane() / 16, own_col = lane() % 16 * 8;
    const bool reads = own_col < own.cols;
    Codes codes(w, own.first_row + own_row, own.first_col + (reads ? own_col : 0), nf4);
    uint4* target = reinterpret_cast<uint4*>(to + own_row * p.ring_stride + own_col);
    int left = own.rows - own_row, asked = left;
    typename Codes::Loaded loaded[kTogether] = {};
    const auto ask = [&](int i) {
      if (asked > 0) loaded[i] = codes.next(w);
      asked -= 2;
    };
#pragma unroll
    for (int i = 0; i < kTogether; ++i) ask(i);
#pragma unroll 1
    for (int row = 0; row < own.rows; row += 2 * kTogether) {  // as often in all lanes
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const typename Codes::Loaded now = loaded[i];
        ask(i);
        const uint4 eight = codes.made_of(w, now);
        if (left > 0 && reads) ptx::store_global(target, eight);
        left -= 2;
        target += p.ring_stride / 4;
      }
    }
  }

  // Where rows start anywhere.
  template <Format kFormat>
  __device__ __forceinline__ void write_entries(const Stored& w, const Extent& own, uint16_t* to, float nf4) const {
#pragma unroll 1
    for (int i = lane(); i < own.rows * work::kPieceCols; i += 32) {  // as often in all lanes
      const int row = i / work::kPieceCols, col = i % work::kPieceCols;
      const float value = entry_of<kFormat>(w, own.first_row + row, own.first_col + (col < own.cols ? col : 0), nf4);
      if (col < own.cols) to[row * p.ring_stride + col] = static_cast<uint16_t>(pack<T>(value, value));
    }
  }
};

}  // namespace fused_lora::sm90
