// Shared memory of a block, and the ring of stages between the thread that loads and the two warpgroups that multiply.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.cuh"
#include "../ptx/sync.cuh"
#include "../ptx/tma.cuh"
#include "../work/item.h"
#include "tensor_map.h"

namespace fused_lora::sm90 {

using work::Item;
using work::Work;

template <typename Int>
__host__ __device__ constexpr int ceil_div(Int a, int b) {
  return static_cast<int>((a + b - 1) / b);
}

constexpr int kBlockM = 128;  // rows of a block's tile

constexpr int kCluster = 2;
constexpr int kPairRows = kCluster * kBlockM;  // of an item
constexpr int kConsumers = 2;  // warpgroups
constexpr int kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kFinishThreads = 64;  // the last two warps of the warpgroup that loads
constexpr int kGateAhead = 8;       // chunks of each thread, a box
// A flag has one writer.
constexpr int kFlagRows = kBlockM / kConsumers;         // of low
constexpr int kChainFlags = kCluster * kConsumers;      // of a gradient item

__host__ __device__ constexpr int boxes_of(int size) { return ceil_div(size, kBox); }

// What becomes of a tile. kGate: columns of two linears, gate and up, whose act(gate) up goes out with them. kGateGrad: it is
// the gradient of act(gate) up, and goes out as those of gate and up.
enum class Epilogue { kPlain, kGate, kGateGrad };

// What a kernel of tiles 128 x kBlockN and ranks up to kBlockR brings into a stage.
// kSegmented: each row has an adapter of its own (work/segments.h), and kBlockR is a window.
template <int kBlockN_, int kBlockR_, Epilogue kEpilogue_ = Epilogue::kPlain, bool kSegmented_ = false>
struct Config {
  static constexpr bool kSegmented = kSegmented_;
  static constexpr int kBlockN = kBlockN_, kBlockR = kBlockR_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr bool kGates = kEpilogue == Epilogue::kGate, kGateGrads = kEpilogue == Epilogue::kGateGrad;
  static constexpr bool kGated = kEpilogue != Epilogue::kPlain;
  static constexpr int kTileCols = kGates ? kBlockN / 2 : kBlockN;  // of out
  static constexpr int kFinishBoxes = kConsumers * kTileCols / kBox;  // of a tile
  static constexpr int kOutBytes = kGates ? 2 * kBoxBytes : kBoxBytes;  // of a warpgroup

  static constexpr int kTileBoxes = 2 + kBlockN / kBox;  // 128 rows of one operand, kBlockN of the other
  // Of rank 16, low can ride on the first column of tiles: its factor's part of a step is a box of its own.
  static constexpr bool kCanRide = kBlockR == 16 && kEpilogue == Epilogue::kPlain && !kSegmented;
  static constexpr int kRideBytes = kCanRide ? 16 * kBox * 2 : 0;

  // Steps of a shrink item sum over as much as fits into a stage, to have enough bytes in flight.
  static constexpr int kShrinkHalves = kTileBoxes >= 2 * (2 + boxes_of(kBlockR)) ? 2 : 1;
  static constexpr int kShrinkBoxes = kShrinkHalves * (2 + boxes_of(kBlockR));

  static constexpr int kGradientBlocks = kBlockN == 256 && kBlockR <= 128 ? 2 : 1;  // of 64 columns, for one warpgroup
  static constexpr int kGradientCols = kConsumers * kGradientBlocks * kBox;
  static constexpr int kGradientBoxes = kGradientCols / kBox + boxes_of(kBlockR);

  static constexpr int kStageBytes = kTileBoxes * kBoxBytes + kRideBytes;
  // Of a thread of the warpgroup that loads and of one that multiplies: all there are.
  static constexpr int kLoadRegisters = kGated ? 72 : 56, kMultiplyRegisters = kGated ? 216 : 224;

  static constexpr int kStages = kBlockN == 256 ? 4 : 6;
  static_assert(kShrinkBoxes <= kTileBoxes && kGradientBoxes <= kTileBoxes, "a stage is made for a tile");
  static_assert(kPairRows == kSegmentRows, "an item's rows are a block of segments");
};

// Which right operands lie with their N index contiguous: a weight backward, and the factors. Slabs are the same both ways.
template <typename C, bool kBackward>
constexpr bool kDownMN = kBackward && !C::kSegmented;
template <typename C, bool kBackward>
constexpr bool kUpMN = kBackward || C::kSegmented;

// Whether a tile brings low forth on its way. Nothing rides backward or where x is masked, so there is no code for it there.
template <typename C, bool kBackward, bool kDrops>
constexpr bool can_ride = C::kCanRide && !kBackward && !kDrops;

template <typename C, bool kBackward, bool kDrops>
__device__ __forceinline__ bool rides(const Item& item) {
  return can_ride<C, kBackward, kDrops> && (item.bits & work::kRides);
}

// Of rows with adapters of their own, what consumers need not look up: of a tile's first step how many steps with ranks there will
// be; and of those which slices of 16 of the stage's boxes are multiplied, and of what: in a gated tile for which 64 of its columns,
// with dropout of which part, and behind 16 bits on which level.
struct Ranks {
  int steps_or_of;
  int16_t first, count;
};

template <typename C>
struct Shared {
  uint8_t stages[C::kStages][C::kStageBytes];
  uint8_t out[kConsumers][C::kOutBytes];
  alignas(16) float2 columns[kConsumers][kWarpgroup];  // columns.cuh's, of an output tile
  uint4 gate_ahead[C::kGateGrads ? kGateAhead : 1][2][C::kGateGrads ? kFinishThreads : 1];  // gate and up from memory
  uint64_t full[C::kStages], empty[C::kStages];
  Ranks ranks[C::kSegmented ? C::kStages : 1];  // of each stage
  uint64_t item_full, item_empty;  // item_empty counts in the first block of the cluster
  Item item;
  int mark;  // the launch's
  // Between the warpgroups that multiply and the finisher: boxes in out, and the tile that they are of.
  uint64_t finish_full[kConsumers], finish_empty[kConsumers], finish_tile_full;
  int4 finish_tile;  // row, column and part; -1: none comes any more
  uint64_t dequantised;  // by both warps of the finisher, all that there was
};

template <typename C>
__device__ void init_barriers(Shared<C>& shared) {
  constexpr int kWarps = kConsumers * kWarpgroup / 32;
  for (int stage = 0; stage < C::kStages; ++stage) {
    ptx::mbarrier_init(&shared.full[stage], 1);
    ptx::mbarrier_init(&shared.empty[stage], kCluster * kWarps);
  }
  for (uint64_t& barrier : shared.finish_full) ptx::mbarrier_init(&barrier, kWarpgroup);
  for (uint64_t& barrier : shared.finish_empty) ptx::mbarrier_init(&barrier, kFinishThreads);
  ptx::mbarrier_init(&shared.finish_tile_full, 1);
  ptx::mbarrier_init(&shared.dequantised, kFinishThreads / 32);
  ptx::mbarrier_init(&shared.item_full, 1);
  ptx::mbarrier_init(&shared.item_empty, kCluster * (kWarps + 1));
  ptx::fence_mbarrier_init();
}

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fused_lora::sm90
