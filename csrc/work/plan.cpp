// Rows come in groups whose tiles run together, so that weight and activations stay in L2. The list goes through the groups;
// before a group's tiles stand the shrink items of a later one, after most of them the gradient items of one near it: memory
// is asked evenly. Where groups are waves, tiles come first, then the next group's shrink items, then gradient items.
#include "plan.h"

#include "workers.h"

namespace fused_lora::work {
namespace {

// Of one group.
struct Rows {
  int first, count;  // in items' rows, as all counts here
};

// How the list is cut. Its order was chosen by measurement (docs/hopper.md).
struct Order {
  int groups = 1;
  int shrink_batch = 0;   // an item's most rows; 0 without shrink items
  int shrink_lead = 0;    // groups between shrink items and the tiles beside them
  int gradient_lead = 0;  // the same of gradient items; negative where they come later than their tiles
  int tail = 0;           // gradient items come before this share of a group's tiles: the last 1 / tail, or none if 0
  bool halves_slices = false;  // of a gradient, which are groups otherwise
  bool waves = false;          // a step begins with its tiles
};

class Planner {
 public:
  Planner(const Pass& pass, const Tiling& tiling) : pass_(pass), tiling_(tiling), rows_(ceil_div(pass.M, tiling.rows)) {
    // Where one tile is of several parts, the first one's columns stand for all.
    const int tiled = !pass.wants_out ? 0 : pass.backward || pass.gated ? 1 : pass.parts;
    for (int i = 0; i < tiled; ++i) tile_cols_ += ceil_div(pass.part[i].cols, tiling.tile_cols);
    for (int i = 0; i < pass.parts; ++i) {
      const PassPart& part = pass.part[i];
      if (pass.needs_low(i)) shrinking_.push_back(i);
      gradient_cols_ += (part.wants_dA ? gradient_cols(part.cols) : 0) + (part.wants_dB ? gradient_cols(part.depth) : 0);
      y_cols_ += part.reads_y ? gradient_cols(part.depth) : 0;
    }
    // Riding delays the other tiles of the first wave; that is worth it where lhs is read by few columns of tiles.
    for (int i = 0; i < pass.parts; ++i) dequantises_ |= pass.dequantises(i);
    rides_ = tiling.can_ride && !dequantises_ && !pass.segmented() && !pass.backward && !pass.drops && pass.parts == 1 && pass.part[0].r > 0 && tile_cols_ <= 4;
    order_ = order();
    for (int group = 0, first = 0; group < order_.groups; ++group) {
      const int count = rows_ / order_.groups + (group < rows_ % order_.groups);
      groups_.push_back({first, count});
      first += count;
    }
    order_.halves_slices = order_.halves_slices && rows_ / order_.groups > 4;
  }

  Plan plan() {
    plan_.tiling = tiling_;
    plan_.low_flags = rows_ * row_flags();
    plan_.chain_flags = tiling_.chain_flags * gradient_cols_ * rank_items_;
    plan_.flags = pass_.parts * plan_.low_flags;
    plan_.finish_spacing = finish_spacing();
    plan_.first_shrinks = order_.shrink_batch > 0 ? ceil_div(groups_[0].count, order_.shrink_batch) * static_cast<int>(shrinking_.size()) : 0;
    for (int i = 0; i < pass_.parts; ++i) plan_.partials += partials(pass_.part[i]);
    if (dequantises_) make_ring();
    list();
    return std::move(plan_);
  }

 private:
  int gradient_cols(int64_t cols) const { return ceil_div(cols, tiling_.gradient_cols); }

  int64_t partials(const PassPart& part) const {
    const int64_t of_A = part.wants_dA ? partial_floats(tiling_, pass_, part.cols) : 0;
    return of_A + (part.wants_dB ? partial_floats(tiling_, pass_, part.depth) + kSums * partial_cols(tiling_, part.depth) : 0);
  }

  // Three quarters of the tiles' columns, or as many as stay in the L2 cache. The list goes through halves of it, of which one is read while
  // the other is filled.
  void make_ring() {
    constexpr int64_t kMostBytes = 64 << 20;
    Ring& ring = plan_.ring;
    const int along = pass_.backward ? kPieceRows : kPieceCols, across = pass_.backward ? kPieceCols : kPieceRows;
    int64_t depth = 0, pieces = 0;
    for (int i = 0; i < (pass_.backward ? pass_.summed : 1); ++i) {
      depth += pass_.part[i].depth;
      pieces += ceil_div(pass_.part[i].depth, along);
    }
    const int64_t of_column = int64_t{tiling_.block_cols} * ((depth + 63) / 64 * 64) * 2;  // of 16 bits
    const int most = std::max(2, static_cast<int>(kMostBytes / of_column) / 2 * 2);
    ring.tiles = std::min({tile_cols_, most, ceil_div(3 * tile_cols_, 4)});
    ring.across = tiling_.block_cols / across;
    ring.of_tile = ring.across * static_cast<int>(pieces);
    ring.pieces = ring.of_tile * tile_cols_;
    ring.rows = rows_;
    ring.bytes = ring.tiles * of_column;
    ring.ready = (plan_.flags + 3) / 4 * 4;
    ring.ready_stride = (ring.of_tile + 3) / 4 * 4;
    ring.done = ring.ready + ring.ready_stride * tile_cols_;
    plan_.flags = ring.done + (2 * rows_ * tile_cols_ + 3) / 4 * 4;
  }

  // Boxes and steps are 64 wide. Where ranks are masked, a tile is gone two steps a box before the next one's depth ends.
  int finish_spacing() const {
    const int spacing = static_cast<int>(pass_.depth() / tiling_.tile_cols);
    return std::max(1, spacing - (pass_.backward && pass_.drops ? 2 : 0));
  }

  // A shrink item costs about half a tile: where tiles are long, two at a time keep the workers in step. Short tiles want shrink
  // and gradient items several groups ahead, since those take longer than a group.
  Order order() const {
    Order order;
    const bool long_tiles = pass_.depth() >= 3072, masks_shrink = pass_.drops && !pass_.backward;  // which makes its items long
    const int most_rows = rides_ ? 32 : 8;  // of a group
    order.groups = ceil_div(rows_, most_rows);
    const bool small_groups = most_rows * tile_cols_ < tiling_.workers / 2;
    if (!shrinking_.empty() && !rides_) {
      const bool pairs = tiling_.strides && long_tiles && tiling_.block_cols == 256 && tiling_.rank <= 128;
      // Masked ones take longer than half a tile, and pairs of them keep tiles waiting: only where they save 3%.
      order.shrink_batch = pairs && (!masks_shrink || masked_end(2) < 0.97 * masked_end(1)) ? 2 : 1;
      order.shrink_lead = !small_groups ? 1 : pass_.backward ? 4 : masks_shrink ? 2 : 1;
    }
    order.gradient_lead = pass_.backward && small_groups ? std::min(2, std::max(0, order.shrink_lead - 1)) : 0;
    order.tail = long_tiles ? 0 : 4;
    // Few rows leave few items, whose chain should be short; masked items take longer, and come last where tiles are short. What
    // reads y takes twice as long.
    order.halves_slices = order.groups == 1 || (pass_.drops && pass_.depth() >= 2048) || y_cols_ > 0;
    const bool few_cols = tile_cols_ > 0 && 5 * tile_cols_ <= tiling_.workers;
    return pass_.backward && long_tiles && few_cols && !pass_.gated && !dequantises_ ? in_waves(order) : order;
  }

  // When a forward pass with a mask ends, in tiles' times: its shrink items of so many rows first, then its tiles, taken by whoever
  // is free.
  double masked_end(int batch) const {
    const double shrink = batch * (tiling_.rank <= 64 ? 0.6 : 0.8);
    const int shrinks = ceil_div(rows_, batch) * static_cast<int>(shrinking_.size());
    Workers workers(tiling_.workers);
    for (int i = 0; i < shrinks + rows_ * tile_cols_; ++i) workers.work_until(workers.next() + (i < shrinks ? shrink : 1));
    return workers.end();
  }

  // Groups such that each one's tiles and what goes with them take all workers the time of one tile: tiles that run together ask
  // for the same bytes at the same time, and what is short fills the workers that have none.
  Order in_waves(Order order) const {
    constexpr int kBox = 64;
    const double steps = static_cast<double>(pass_.depth()) / kBox;  // of a tile; those of the others take so much of their time:
    const double shrink = 0.6 * steps, gradient = 0.95 * tiling_.rows / kBox * (gradient_cols_ + y_cols_);
    const double waves = rows_ * (tile_cols_ * steps + shrink + gradient) / (tiling_.workers * steps);
    order.groups = std::max({1, static_cast<int>(waves + 0.5), ceil_div(rows_ * tile_cols_, tiling_.workers)});
    order.groups = std::min(order.groups, rows_);
    order.shrink_batch = std::min(order.shrink_batch, 1);
    order.shrink_lead = 1;
    order.gradient_lead = 0;
    order.waves = true;
    return order;
  }

  void list() {
    const int at_once = dequantises_ ? ceil_div(plan_.ring.tiles, 2) : std::max(1, tile_cols_);
    list_columns(0, std::min(at_once, tile_cols_));
    int step = order_.groups;
    for (int col = at_once; col < tile_cols_; col += at_once) {
      for (int group = 0; group < order_.groups; ++group, ++step) {
        add_tiles(group, col, 0, groups_[group].count * std::min(at_once, tile_cols_ - col));
        add_spread_gradients(step);
      }
    }
  }

  // Gradients of one group after another, as evenly as steps of all columns allow.
  void add_spread_gradients(int step) {
    const int times = ceil_div(tile_cols_, ceil_div(plan_.ring.tiles, 2));
    if ((step + 1) % times == 0) add_gradients((step + 1) / times - 1);
  }

  // The first columns of tiles, with all that is no tile between them.
  void list_columns(int col, int columns) {
    const int last_step = order_.groups + std::max(0, -order_.gradient_lead);
    for (int step = -std::max(order_.shrink_lead, order_.gradient_lead); step < last_step; ++step) {
      const int tiles = exists(step) ? groups_[step].count * columns : 0;
      const int first_tiles = order_.tail == 0 ? tiles : tiles - tiles / order_.tail;
      if (order_.waves) add_tiles(step, col, 0, tiles);
      if (order_.shrink_batch > 0) add_shrinks(step + order_.shrink_lead);
      if (!order_.waves) add_tiles(step, col, 0, first_tiles);
      if (!dequantises_) add_gradients(step + order_.gradient_lead);
      if (!order_.waves) add_tiles(step, col, first_tiles, tiles);
      if (dequantises_ && exists(step)) add_spread_gradients(step);
    }
  }

  bool exists(int group) const { return group >= 0 && group < order_.groups; }
  int row_flags() const { return rank_items_ * (tiling_.rows / tiling_.flag_rows); }
  int low_flag(int part, int row) const { return part * plan_.low_flags + row * row_flags(); }

  void add(Work work, int bits, int part, Rows rows, int col, int waits, int raises, int stride_or_rank = 0) {
    plan_.items.push_back({work, static_cast<uint8_t>(bits), static_cast<int16_t>(part), rows.first * tiling_.rows,
                           rows.count * tiling_.rows, col, waits, raises, 0, {stride_or_rank}});
  }

  // The group's rows dealt to its items in turn: the first of each come first. The same rows of all parts follow one another.
  void add_shrinks(int group) {
    if (!exists(group)) return;
    const Rows rows = groups_[group];
    const int stride = ceil_div(rows.count, order_.shrink_batch);
    for (int i = 0; i < stride; ++i) {
      const int count = ceil_div(rows.count - i, stride), row = rows.first + i;
      for (int part : shrinking_) {
        if (tiling_.strides) {
          add(Work::kShrink, 0, part, {row, count * stride}, 0, kNone, low_flag(part, row), stride * tiling_.rows);
        }
        for (int k = 0; !tiling_.strides && k < rank_items_; ++k) {
          add(Work::kShrink, 0, part, {row, 1}, 0, kNone, low_flag(part, row) + k, k * tiling_.item_ranks);
        }
      }
    }
  }

  // Of the group's tiles from a column on, column by column.
  void add_tiles(int group, int first_col, int first, int last) {
    for (int i = first; i < last; ++i) {
      const Rows rows = groups_[group];
      const int column = first_col + i / rows.count, row = rows.first + i % rows.count;
      int col = column, part = 0;
      for (int own; col >= (own = ceil_div(pass_.part[part].cols, tiling_.tile_cols)); ++part) col -= own;
      const bool rides = rides_ && col == 0;
      const int low = shrinking_.empty() ? kNone : low_flag(part, row);
      const Ring& ring = plan_.ring;
      const bool by_ring = ring.tiles > 0;
      const int place = by_ring ? column % ring.tiles * tiling_.block_cols : 0;
      const int raises = by_ring ? ring.done + 2 * (column * rows_ + row) : rides && tile_cols_ > 1 ? low : kNone;
      add(Work::kTile, rides ? kRides : 0, part, {row, 1}, col * tiling_.tile_cols, rides ? kNone : low, raises, place);
    }
  }

  void add_gradients(int group) {
    if (!exists(group)) return;
    const Rows rows = groups_[group];
    const int half = order_.halves_slices ? ceil_div(rows.count, 2) : rows.count;
    add_slice({rows.first, half});
    if (half < rows.count) add_slice({rows.first + half, rows.count - half});
  }

  void add_slice(Rows slice) {
    for (int i = 0; i < pass_.parts; ++i) {
      const PassPart& part = pass_.part[i];
      for (int col = 0; part.wants_dB && col < gradient_cols(part.depth); ++col) {
        add_gradient(Work::kGradientB, i, slice, col, kNone);
      }
      for (int col = 0; part.wants_dA && col < gradient_cols(part.cols); ++col) {
        add_gradient(Work::kGradientA, i, slice, col, i < pass_.summed ? low_flag(i, slice.first) : kNone);
      }
    }
  }

  // Slices of the same columns are chained in order: each waits for the one before.
  void add_gradient(Work work, int part, Rows slice, int col, int waits) {
    const int bits = (slice.first == 0 ? kFirst : 0) | (slice.first + slice.count == rows_ ? kLast : 0);
    for (int k = 0; k < rank_items_; ++k, plan_.flags += tiling_.chain_flags) {
      add(work, bits, part, slice, col * tiling_.gradient_cols, waits, plan_.flags, k * tiling_.item_ranks);
    }
  }

  const Pass& pass_;
  const Tiling& tiling_;
  const int rows_, rank_items_ = tiling_.rank / tiling_.item_ranks;
  int tile_cols_ = 0, gradient_cols_ = 0, y_cols_ = 0;  // of all parts, in items
  std::vector<int> shrinking_;             // parts whose low is wanted
  bool dequantises_ = false;
  bool rides_;                             // low comes from the first column of tiles instead of shrink items
  Order order_;
  std::vector<Rows> groups_;
  Plan plan_{};
};

}  // namespace

Plan make_plan(const Pass& pass, const Tiling& tiling) { return Planner(pass, tiling).plan(); }

}  // namespace fused_lora::work
