// A work item: what a worker does next, what it waits for before, and what it tells others after. 32 bytes, which the planner
// writes and a kernel reads with two loads.
//
// Flags are numbers in a launch's array. Whoever raises one stores the launch's mark there, which no launch before it had, so
// that nothing needs clearing. An item waits only for what earlier ones raise: whoever is running can always finish.
#pragma once

#include <cstdint>

namespace fused_lora::work {

enum class Work : int8_t { kShrink, kTile, kGradientA, kGradientB, kEnd };

constexpr int kNone = -1;  // no flag
constexpr int kSums = 2;   // that may be made of a column of dy by itself: of dy, and of dy y

enum Bits : uint8_t {
  kFirst = 1,  // a gradient's sums begin here
  kLast = 2,   // and are whole here
  kRides = 4,  // a tile that brings low forth on its way
  kHalf = 8,   // of a tile's or a shrink item's depth, the half with which its sums begin, or the one with which they are whole
};

struct alignas(16) Item {
  Work work;
  uint8_t bits;
  int16_t part;  // of the group: whose low, whose columns of out (backward they are one), whose gradient
  int row, rows;  // of low, out, or of the tokens that a gradient sums over; out's are one tile
  int col;        // the first of a tile or a gradient
  int waits;   // the flag of the first rows of low that are read
  int raises;  // the first of its own; of a tile by a ring, that it has read its weight. A gradient but the first waits for those of the slice before, chain_flags before them
  int mark;    // the launch's, once an item is taken
  union {
    int stride;  // a shrink item makes low of an item's rows every `stride` rows, in `rows` of them
    int rank;    // or, where items have not all ranks, the first of its own; of a gradient too
    int half;    // of a half, the number of the item that was cut
    int place;   // of a tile by a ring, the column with which its weight begins where it is dequantised (ring.h)
  };
};
static_assert(sizeof(Item) == 32, "two loads of 16 bytes");

// What precedes the flags: zeros before the first launch that uses them.
struct alignas(16) Counters {
  int launches;
  int taken;   // items, and more
  int exited;  // blocks
  int filled, refilled;  // pieces of weights that were taken, and more: of the ring when it is empty, and others
  int unused[3];
};

}  // namespace fused_lora::work
