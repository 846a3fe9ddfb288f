// What a pass is, from its sizes alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "../lora_linear.h"

namespace fused_lora::work {

template <typename Int>
constexpr int ceil_div(Int a, int b) {
  return static_cast<int>((a + b - 1) / b);
}

constexpr int kListRows = 128;  // the rows of every kernel's items are a multiple of these

// What one linear of a group adds to a pass: out (M, cols) sums over depth. Backward the summed ones have the same cols, and one
// out.
struct PassPart {
  int64_t cols, depth, r;       // r = 0: it has no factors
  bool wants_dA, wants_dB;      // backward; sums over tokens come with dB
  bool reads_y;                 // for them, in steps beside those of dy
  bool stored;                  // its weight is in a format
};

struct Pass {
  int64_t M;
  bool backward, drops, wants_out, gated;
  int parts, summed;  // summed: those that tiles are made of, which come first
  int levels;         // rows have so many adapters of their own, and r is a window's; 0: the part's
  PassPart part[kMostParts];

  bool segmented() const { return levels > 0; }
  int sums() const { return std::max(levels, 1); }  // of a gradient that are under way at once

  bool needs_low(int i) const { return i < summed && part[i].r > 0 && (wants_out || part[i].wants_dA); }
  int64_t most_rank() const {
    int64_t r = 0;
    for (int i = 0; i < parts; ++i) r = std::max(r, part[i].r);
    return r;
  }
  // Whether tiles read a part's weight from where it is dequantised.
  bool dequantises(int i) const { return wants_out && i < summed && part[i].stored; }

  // Of one tile's products.
  int64_t depth() const {
    int64_t sum = part[0].depth;
    for (int i = 1; backward && i < summed; ++i) sum += part[i].depth;
    return sum;
  }
  int tile_cols(int width) const {
    int sum = 0;
    for (int i = 0; i < (backward ? 1 : parts); ++i) sum += ceil_div(part[i].cols, width);
    return sum;
  }

  // All that a list knows of M.
  int64_t listed_rows() const { return int64_t{kListRows} * ceil_div(M, kListRows); }

  // Passes with the same one have the same list.
  using Key = std::array<int64_t, 3 + 4 * kMostParts>;
  Key key() const {
    Key key{listed_rows(), backward | drops << 1 | wants_out << 2 | gated << 3 | levels << 4, parts | summed << 8};
    for (int i = 0; i < parts; ++i) {
      const int64_t of_part[4] = {part[i].cols, part[i].depth, part[i].r, part[i].wants_dA | part[i].wants_dB << 1 | part[i].reads_y << 2 | part[i].stored << 3};
      std::copy_n(of_part, 4, key.begin() + 3 + 4 * i);
    }
    return key;
  }
};

// Sums of dy, and of its products with y, come with dB.
inline bool wants_dB(const BackwardPart& part) { return part.dB.data != nullptr || part.dbias.data != nullptr || part.dgain != nullptr; }

template <typename Params>
int levels_of(const Params& params) {
  int levels = 0;
  for (int i = 0; i < params.parts; ++i) levels = std::max(levels, params.part[i].segments.levels);
  return levels;
}

inline int64_t ranks_of(int window, const Operand& A) { return window > 0 && A.rows > 0 ? window : A.rows; }

inline Pass pass_of(const ForwardParams& f) {
  Pass pass{f.x.rows, false, f.part[0].dropout.seed != nullptr, true, f.gated, f.parts, f.parts, levels_of(f), {}};
  for (int i = 0; i < f.parts; ++i) pass.part[i] = {f.part[i].weight.rows, f.x.cols, ranks_of(f.window, f.part[i].A), false, false, false, f.part[i].stored.exists()};
  return pass;
}

inline Pass pass_of(const BackwardParams& b) {
  Pass pass{b.part[0].dy.rows, true, b.part[0].dropout.seed != nullptr, b.dx.data != nullptr || b.gated, b.gated, b.parts, b.summed, levels_of(b), {}};
  for (int i = 0; i < b.parts; ++i) {
    const BackwardPart& part = b.part[i];
    pass.part[i] = {part.x.cols, part.dy.cols, ranks_of(b.window, part.A), part.dA.data != nullptr, wants_dB(part), part.dgain != nullptr, part.stored.exists()};
  }
  return pass;
}

}  // namespace fused_lora::work
