#include "halves.h"

#include <algorithm>

#include "workers.h"

namespace fused_lora::work {
namespace {

constexpr int kStep = 32;  // of a depth

// A list played by workers that take the next item whenever they are free. Times are in those of a tile's step; an item's ends are
// what it takes beside its steps. As csrc/sm80's clocks have them (docs/sm80.md).
class Play {
 public:
  Play(const Pass& pass, const Plan& plan) : pass_(pass), plan_(plan), raised_(plan.flags), workers_(plan.tiling.workers) {}

  double end() {
    for (const Item& item : plan_.items) workers_.work_until(end_of(item, workers_.next()));
    return workers_.end();
  }

 private:
  static constexpr double kTileEnds = 13, kShrinkEnds = 7, kGradientEnds = 12, kHalfEnds = 5;
  static constexpr double kMask = 0.4, kTileMask = 1;  // of a step of x, and of a tile

  // Of a step of a shrink or gradient item.
  double pace() const { return plan_.tiling.item_ranks <= 16 ? 0.75 : plan_.tiling.item_ranks <= 64 ? 0.85 : 1.2; }

  double end_of(const Item& item, double start) {
    if (item.work == Work::kTile) return tile_end(item, start);
    return item.work == Work::kShrink ? shrink_end(item, start) : gradient_end(item, start);
  }

  double tile_end(const Item& item, double start) {
    const bool masked = pass_.drops && pass_.backward;
    const double depth = steps(item, pass_.depth()), ranks = steps_of(pass_.most_rank()) * (masked ? 2 : 1) + (masked ? kTileMask : 0);
    double done = start + depth;
    if (ends_sum(item)) done = std::max(done, low_of(item)) + ranks;
    return half_end(item, done + kTileEnds);
  }

  double shrink_end(const Item& item, double start) {
    const double mask = pass_.drops && !pass_.backward ? kMask : 0;
    const double done = half_end(item, start + steps(item, pass_.part[item.part].depth) * (pace() + mask) + kShrinkEnds);
    if (ends_sum(item)) raised_[item.raises] = done;
    return done;
  }

  double gradient_end(const Item& item, double start) {
    const double mask = pass_.drops && item.work == Work::kGradientA ? kMask : 0;
    if (item.waits != kNone) {
      const int rows = item.rows / plan_.tiling.rows, each = plan_.low_flags / ceil_div(pass_.M, plan_.tiling.rows);
      for (int i = 0; i < rows * each; ++i) start = std::max(start, raised_[item.waits + i]);
    }
    double done = start + steps_of(std::min<int64_t>(item.rows, pass_.listed_rows() - item.row)) * (pace() + mask);
    if (!(item.bits & kFirst)) done = std::max(done, raised_[item.raises - plan_.chain_flags]);
    return raised_[item.raises] = done + kGradientEnds;
  }

  // The second half waits for the first.
  double half_end(const Item& item, double done) {
    if (!(item.bits & kHalf)) return done;
    double& first = raised_[plan_.half_flags + item.half];
    return item.bits & kFirst ? first = done : std::max(done, first) + kHalfEnds;
  }

  // A whole item, or its second half.
  static bool ends_sum(const Item& item) { return !(item.bits & kHalf) || item.bits & kLast; }

  // When all of a tile's low is there.
  double low_of(const Item& item) const {
    if (item.waits == kNone) return 0;
    double last = 0;
    for (int i = 0; i < (pass_.backward ? pass_.summed : pass_.gated ? 2 : 1); ++i) {
      last = std::max(last, raised_[item.waits + i * plan_.low_flags]);
    }
    return last;
  }

  static double steps_of(int64_t depth) { return ceil_div(depth, kStep); }
  static double steps(const Item& item, int64_t depth) { return steps_of(depth) / (item.bits & kHalf ? 2 : 1); }

  const Pass& pass_;
  const Plan& plan_;
  std::vector<double> raised_;
  Workers workers_;
};

bool can_halve(const Pass& pass, const Plan& plan, const Item& item) {
  if (item.work == Work::kShrink) return plan.tiling.item_ranks == plan.tiling.rank && pass.part[item.part].depth > kStep;
  // What several depths are summed over is not cut.
  return item.work == Work::kTile && pass.part[item.part].depth > kStep && (!pass.backward || pass.summed == 1);
}

void add_halves(Plan& plan, Item item) {
  item.half = plan.halves++;
  for (Bits half : {kFirst, kLast}) {
    item.bits = kHalf | half;
    plan.items.push_back(item);
  }
}

}  // namespace

void halve(const Pass& pass, Plan& plan, int shrinks, int tiles) {
  const std::vector<Item> whole = std::move(plan.items);
  plan.items.clear();
  int whole_tiles = -tiles;
  for (const Item& item : whole) whole_tiles += item.work == Work::kTile;
  for (const Item& item : whole) {
    const bool halved = item.work == Work::kShrink ? shrinks-- > 0 : item.work == Work::kTile && whole_tiles-- <= 0;
    if (halved && can_halve(pass, plan, item)) add_halves(plan, item);
    else plan.items.push_back(item);
  }
  plan.half_flags = plan.flags;
  plan.flags += plan.halves;
  plan.half_floats = plan.halves * int64_t{plan.tiling.rows} * plan.tiling.block_cols;
}

Plan balanced(const Pass& pass, const Plan& plan) {
  const int workers = plan.tiling.workers;
  constexpr int kMostWaves = 48;  // halves matter little in long lists
  constexpr int kTries = 8;       // with more and more tiles cut, up to half as many as there are workers
  if (static_cast<int>(plan.items.size()) > kMostWaves * workers) return plan;
  const auto tiles = std::count_if(plan.items.begin(), plan.items.end(), [](const Item& item) { return item.work == Work::kTile; });
  // In one wave no tile begins later than its neighbours.
  const int first = plan.tiling.cuts_shrinks || tiles <= workers ? plan.first_shrinks : 0;
  Plan best = plan;
  double soonest = Play(pass, best).end();
  for (int shrinks = 0; shrinks <= 2 * first; shrinks += std::max(1, first)) {
    for (int i = 0; i <= kTries; ++i) {
      Plan other = plan;
      halve(pass, other, shrinks, workers / 2 * i / kTries);
      const double end = Play(pass, other).end();
      if (end < soonest * 0.998) {
        soonest = end;
        best = std::move(other);
      }
    }
  }
  return best;
}

}  // namespace fused_lora::work
