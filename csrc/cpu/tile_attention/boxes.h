// Boxes of tokens of one side, and what they see of the other: the walk that forward and backward share.
//
// The other side comes in segments, tokens that follow one another in memory, which fill tiles one after another.
#pragma once

#include "cpu/core/arena.h"
#include "cpu/frame_attention/tiles.h"
#include "cpu/tile_attention/shapes.h"

namespace vdcore::cpu::VDCORE_ISA {

// The most. A unit's sums are loaded, scaled and stored once a tile, and it sees less than half of one that its box
// gathers: 256 tokens against 128, windows of 6 to 77 %, took 0.89 to 1.01 of the time forward and 0.91 to 1.01
// backward in pairs of bfloat16, but 0.96 to 1.01 in float32, where sums of 128 err by less.
constexpr int64_t kOtherTile = 256;

// Tokens that all see each other's tile, or a rectangle of frames [f0, f1), or a piece of the text.
struct Box {
  int64_t sample, head;
  bool text;
  const HeadGroup* group;  // null: of lists, or text
  int64_t list, tile;      // of lists
  int64_t f0, f1;
  int32_t y0, y1, x0, x1;
  int64_t begin, end;  // text: tokens; of lists: tokens of the tile
};

// A segment of the other side: `row`: one row's columns from `first` on; kBand: whole rows, `first` counts tokens of
// the frame; kClear: whatever it is, all of the box see it.
struct Segment {
  static constexpr int32_t kBand = -1, kClear = -2;
  TokenRun tokens;
  int32_t row, first;
  Seen seen;
};

// A part of a segment, in a tile.
struct Piece {
  Segment of;
  int32_t at, count;
};

struct SlotRun {
  int64_t slot;
  TokenRun tokens;
};

// The box's tokens, unit by unit: unit u has slots [u * lanes, u * lanes + filled[u]).
struct Slots {
  int64_t lanes = 0, units = 0;
  int64_t filled[kMostUnits];
  int32_t y0[kMostUnits], y1[kMostUnits], x0[kMostUnits], x1[kMostUnits];
  SlotRun runs[kBoxTokens];
  int64_t run_count = 0;
  int32_t f[kBoxTokens], y[kBoxTokens], x[kBoxTokens];  // of slots; what pads a unit is where its last token is
  // What a unit's slots see of rows and columns of one frame.
  int64_t lanes_of = -1;
  Seen lanes_seen;
  int32_t row_begin[kMostLanes], row_end[kMostLanes], column_begin[kMostLanes], column_end[kMostLanes];

  VDCORE_INLINE int64_t in_use(int64_t u) const { return round_up(filled[u]); }
  template <typename Body>
  VDCORE_INLINE void for_runs(const Body& body) const {
    for (int64_t i = 0; i < run_count; ++i) body(runs[i]);
  }
};

// What a unit sees of a tile: runs of the tile's tokens that somebody sees, and of these the parts that not all see.
struct UnitView {
  struct Edge {
    int32_t begin, end;  // in the tile
    const Piece* piece;
  };
  Run runs[kOtherTile];
  Edge parts[kOtherTile];  // of the runs, in order; piece null: all see them
  int64_t run_count = 0, part_count = 0;

  VDCORE_INLINE void add(int64_t begin, int64_t end, const Piece* edge) {
    if (end <= begin) return;
    if (run_count && runs[run_count - 1].end == begin)
      runs[run_count - 1].end = end;
    else
      runs[run_count++] = {begin, end};
    if (part_count && !edge && !parts[part_count - 1].piece && parts[part_count - 1].end == begin)
      parts[part_count - 1].end = static_cast<int32_t>(end);
    else
      parts[part_count++] = {static_cast<int32_t>(begin), static_cast<int32_t>(end), edge};
  }
};

// ---- Boxes of a call ---------------------------------------------------------------------------------------------

// All boxes of one side, with one entry for each head of that side, in order: groups, or lists, then the text.
class Boxes {
 public:
  Boxes(const TilePlan& plan, Side side, int64_t heads, int64_t shared, Shape* shapes)
      : plan_(plan), side_(side), heads_(heads), shared_(shared), shapes_(shapes) {
    for (int64_t g = 0; g < plan.group_count; ++g)
      shapes[g] = best_shape(plan, plan.groups[g].side[side], plan.frames[side]);
    text_ = (plan.text + kBoxTokens - 1) / kBoxTokens;
    if (plan.has_lists()) per_tile_ = (plan.tile[0] * plan.tile[1] * plan.tile[2] + kBoxTokens - 1) / kBoxTokens;
  }

  int64_t items() const {
    int64_t total = plan_.batch * heads_ * text_;
    for (int64_t g = 0; g < plan_.group_count; ++g) total += of_group(g);
    return plan_.has_lists() ? plan_.batch * heads_ * plan_.tile_count() * per_tile_ : total;
  }

  const Shape& shape(const Box& box) const { return shapes_[box.group - plan_.groups]; }

  // `head` counts heads of this side.
  Box at(int64_t item) const {
    Box box = {};
    if (plan_.has_lists()) {
      const int64_t piece = item % per_tile_;
      item /= per_tile_;
      box.tile = item % plan_.tile_count();
      item /= plan_.tile_count();
      box.head = item % heads_;
      box.sample = item / heads_;
      box.begin = piece * kBoxTokens;
      box.end = box.begin + kBoxTokens;
      return box;
    }
    for (int64_t g = 0; g < plan_.group_count; ++g) {
      if (item >= of_group(g)) {
        item -= of_group(g);
        continue;
      }
      const HeadGroup& group = plan_.groups[g];
      const Shape& s = shapes_[g];
      const int64_t across = (plan_.columns + s.box_columns - 1) / s.box_columns, per_block = boxes_of_block(s);
      const int64_t place = item % per_block;
      item /= per_block;
      box.f0 = item % blocks_of_frames(s) * s.frames;
      box.f1 = smaller(box.f0 + s.frames, plan_.frames[side_]);
      item /= blocks_of_frames(s);
      const int64_t first = group.first_head / shared_, count = group.end_head / shared_ - first;
      box.head = first + item % count;
      box.sample = item / count;
      box.group = &group;
      box.y0 = static_cast<int32_t>(place / across * s.box_rows);
      box.x0 = static_cast<int32_t>(place % across * s.box_columns);
      box.y1 = static_cast<int32_t>(smaller(box.y0 + s.box_rows, plan_.rows));
      box.x1 = static_cast<int32_t>(smaller(box.x0 + s.box_columns, plan_.columns));
      return box;
    }
    box.text = true;
    box.begin = item % text_ * kBoxTokens;
    box.end = smaller(box.begin + kBoxTokens, plan_.text);
    item /= text_;
    box.head = item % heads_;
    box.sample = item / heads_;
    return box;
  }

 private:
  const TilePlan& plan_;
  const Side side_;
  const int64_t heads_, shared_;  // shared: query heads for one of this side
  Shape* shapes_;
  int64_t text_ = 0, per_tile_ = 0;

  int64_t blocks_of_frames(const Shape& s) const { return (plan_.frames[side_] + s.frames - 1) / s.frames; }
  int64_t boxes_of_block(const Shape& s) const {
    return ((plan_.rows + s.box_rows - 1) / s.box_rows) * ((plan_.columns + s.box_columns - 1) / s.box_columns);
  }
  int64_t of_group(int64_t g) const {
    const int64_t heads = plan_.groups[g].end_head / shared_ - plan_.groups[g].first_head / shared_;
    return plan_.batch * heads * blocks_of_frames(shapes_[g]) * boxes_of_block(shapes_[g]);
  }
};

// ---- The tokens of a box -----------------------------------------------------------------------------------------

VDCORE_INLINE void add_runs(Slots& slots, TokenRun run, int64_t& slot) {
  while (run.size()) {
    const int64_t room = slots.lanes - slot % slots.lanes;
    const TokenRun some = piece(run, 0, room);
    slots.runs[slots.run_count++] = {slot, some};
    slot += some.size();
    run.begin += some.size();
  }
}

VDCORE_INLINE void fill_units(Slots& slots, int64_t filled) {
  slots.units = (filled + slots.lanes - 1) / slots.lanes;
  for (int64_t u = 0; u < slots.units; ++u) slots.filled[u] = smaller(slots.lanes, filled - u * slots.lanes);
}

// Calls body(slot in its unit, tokens) for runs of slots, and done(unit) after each unit's.
template <typename Body, typename Done>
VDCORE_INLINE void for_units(const Slots& slots, const Body& body, const Done& done) {
  int64_t u = 0;
  slots.for_runs([&](const SlotRun& r) {
    if (r.slot / slots.lanes != u) done(u++);
    body(r.slot % slots.lanes, r.tokens);
  });
  done(u);
}

// Calls body(run) for the tokens of a tile, as runs inside of rows or whole frames of it.
template <typename Body>
VDCORE_INLINE void for_tile(const TilePlan& plan, int64_t tile, const Body& body) {
  const int64_t x = tile % plan.tiles[2], y = tile / plan.tiles[2] % plan.tiles[1],
                t = tile / plan.tiles[2] / plan.tiles[1];
  const int64_t x0 = x * plan.tile[2], x1 = smaller(x0 + plan.tile[2], plan.columns);
  const int64_t y0 = y * plan.tile[1], y1 = smaller(y0 + plan.tile[1], plan.rows);
  const int64_t last = smaller((t + 1) * plan.tile[0], plan.frames[0]);
  for (int64_t f = t * plan.tile[0]; f < last; ++f) {
    const int64_t frame = f * plan.per_frame();
    if (x1 - x0 == plan.columns) {
      body(TokenRun{false, frame + y0 * plan.columns, frame + y1 * plan.columns});
      continue;
    }
    for (int64_t r = y0; r < y1; ++r)
      body(TokenRun{false, frame + r * plan.columns + x0, frame + r * plan.columns + x1});
  }
}

// Calls body(tokens) for those of a box that take no part: they lie behind their sample's length.
template <typename Body>
inline void for_dead(const TilePlan& plan, const Box& box, Side side, const Body& body) {
  if (box.text) body(TokenRun{true, smaller(larger(box.begin, plan.text_live[box.sample]), box.end), box.end});
  if (!box.group) return;
  for (int64_t f = larger(box.f0, plan.live[side][box.sample]); f < box.f1; ++f)
    for (int64_t y = box.y0; y < box.y1; ++y) {
      const int64_t token = (f * plan.rows + y) * plan.columns;
      body(TokenRun{false, token + box.x0, token + box.x1});
    }
}

// The others.
inline void find_slots(const TilePlan& plan, const Box& box, Side side, const Shape* shape, Slots& slots) {
  slots.run_count = 0;
  slots.lanes_of = -1;
  if (!box.group) {
    slots.lanes = kMostLanes;
    int64_t slot = 0;
    if (box.text) {
      add_runs(slots, {true, box.begin, smaller(box.end, plan.text_live[box.sample])}, slot);
    } else {
      int64_t before = 0;  // tokens of the tile
      for_tile(plan, box.tile, [&](const TokenRun& run) {
        const int64_t from = larger(box.begin - before, 0), to = smaller(box.end - before, run.size());
        if (from < to) add_runs(slots, {false, run.begin + from, run.begin + to}, slot);
        before += run.size();
      });
    }
    fill_units(slots, slot);
    return;
  }
  slots.lanes = round_up(int64_t{shape->frames} * shape->unit_rows * shape->unit_columns);
  slots.units = 0;
  const int64_t frames = smaller(box.f1, plan.live[side][box.sample]) - box.f0;
  if (frames <= 0) return;
  for (int32_t y = box.y0; y < box.y1; y += shape->unit_rows)
    for (int32_t x = box.x0; x < box.x1; x += shape->unit_columns) {
      const int64_t u = slots.units++;
      slots.y0[u] = y;
      slots.x0[u] = x;
      const int32_t y1 = slots.y1[u] = static_cast<int32_t>(smaller(y + shape->unit_rows, box.y1));
      const int32_t x1 = slots.x1[u] = static_cast<int32_t>(smaller(x + shape->unit_columns, box.x1));
      int64_t slot = u * slots.lanes;
      const auto put = [&](int64_t f, int32_t r, int32_t c) {
        slots.f[slot] = static_cast<int32_t>(f), slots.y[slot] = r, slots.x[slot++] = c;
      };
      for (int64_t f = 0; f < frames; ++f)
        for (int32_t r = y; r < y1; ++r) {
          const int64_t token = ((box.f0 + f) * plan.rows + r) * plan.columns;
          slots.runs[slots.run_count++] = {slot, {false, token + x, token + x1}};
          for (int32_t c = x; c < x1; ++c) put(f, r, c);
        }
      slots.filled[u] = slot - u * slots.lanes;
      while (slot < (u + 1) * slots.lanes) put(frames - 1, y1 - 1, x1 - 1);
    }
}

// ---- What a box sees ---------------------------------------------------------------------------------------------

// Whether all of the box that see a frame see whole rows of it.
VDCORE_INLINE bool whole_rows(const TilePlan& plan, const GridWindows& w, const Seen& seen, int64_t frames,
                              const Box& box) {
  for (int64_t i = 0; i < frames; ++i) {
    if (seen.column[i] < 0) continue;
    const int64_t at = seen.column[i] * plan.columns;
    if (w.column_begin[at + box.x1 - 1] != 0 || w.column_end[at + box.x0] != plan.columns) return false;
  }
  return true;
}

// Calls body(segment) for what somebody of the box sees of the other side, or, with `common`, everybody.
template <typename Body>
VDCORE_INLINE void for_segments(const TilePlan& plan, const Box& box, Side side, int64_t list, bool common,
                                const Body& body) {
  const int64_t limit = plan.live[1 - side][box.sample], own = plan.live[side][box.sample];
  const auto clear = [&](TokenRun run) {
    if (run.size()) body(Segment{run, Segment::kClear, 0, {}});
  };
  if (!box.group && !box.text) {  // of lists
    const ListedTiles& listed = plan.listed[side];
    const int64_t* first = listed.first + list * (plan.tile_count() + 1) + box.tile;
    for (int64_t i = first[0]; i < first[1]; ++i) for_tile(plan, listed.tiles[i], clear);
    return;
  }
  const TokenRun all_text = {true, 0, plan.text_live[box.sample]};
  if (box.text) {
    if (side == kKeys || plan.text_sees_video) clear({false, 0, limit * plan.per_frame()});
    return clear(all_text);
  }
  const int64_t end = smaller(box.f1, own);
  if (end <= box.f0) return;
  for_seen_frames(box.group->side[side], box.f0, end, limit, [&](int64_t other, const Seen& seen) {
    const GridWindows& w = box.group->side[side];
    Run rows, columns, all_rows, all_columns;
    seen_rows(plan, w, seen, end - box.f0, box.y0, box.y1 - 1, rows, all_rows);
    seen_columns(plan, w, seen, end - box.f0, box.x0, box.x1 - 1, columns, all_columns);
    // A band is whole rows for all that see the frame, whoever else there is.
    const bool band = whole_rows(plan, w, seen, end - box.f0, box);
    if (common) rows = all_rows, columns = all_columns;
    if (!rows.size() || !columns.size()) return;
    const int64_t frame = other * plan.per_frame();
    if (band) {
      const int64_t begin = rows.begin * plan.columns, last = rows.end * plan.columns;
      return body(Segment{{false, frame + begin, frame + last}, Segment::kBand, static_cast<int32_t>(begin), seen});
    }
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const int64_t token = frame + y * plan.columns;
      body(Segment{{false, token + columns.begin, token + columns.end},
                   static_cast<int32_t>(y),
                   static_cast<int32_t>(columns.begin),
                   seen});
    }
  });
  if (side == kQueries || plan.text_sees_video) clear(all_text);
}

// Fills tiles of the other side with segments; flush(pieces, count, tokens) for each.
struct OtherTile {
  Piece pieces[kOtherTile];
  int64_t most, count, tokens;

  void start(int64_t size) { most = size, count = tokens = 0; }

  template <typename Flush>
  VDCORE_INLINE void add(Segment segment, const Flush& flush) {
    while (segment.tokens.size()) {
      const int64_t take = smaller(segment.tokens.size(), most - tokens);
      Piece& p = pieces[count++];
      p = {segment, static_cast<int32_t>(tokens), static_cast<int32_t>(take)};
      p.of.tokens.end = p.of.tokens.begin + take;
      segment.tokens.begin += take;
      segment.first += static_cast<int32_t>(take);
      tokens += take;
      if (tokens == most) finish(flush);
    }
  }
  template <typename Flush>
  VDCORE_INLINE void finish(const Flush& flush) {
    if (tokens) flush();
    count = tokens = 0;
  }
};

inline void find_view(const TilePlan& plan, const Box& box, Side side, const Slots& slots, int64_t u,
                      const OtherTile& tile, UnitView& view) {
  view.run_count = view.part_count = 0;
  const Piece* known = nullptr;  // whose ranges these are
  Run some_rows, all_rows, some_columns, all_columns;
  for (int64_t i = 0; i < tile.count; ++i) {
    const Piece& p = tile.pieces[i];
    if (p.of.row == Segment::kClear) {
      view.add(p.at, p.at + p.count, nullptr);
      continue;
    }
    if (!known || !(known->of.seen == p.of.seen)) {
      const GridWindows& w = box.group->side[side];
      const int64_t frames = smaller(box.f1, plan.live[side][box.sample]) - box.f0;
      seen_rows(plan, w, p.of.seen, frames, slots.y0[u], slots.y1[u] - 1, some_rows, all_rows);
      seen_columns(plan, w, p.of.seen, frames, slots.x0[u], slots.x1[u] - 1, some_columns, all_columns);
    }
    known = &p;
    Run some = some_columns, all = all_columns;
    bool everybody = true;
    if (p.of.row == Segment::kBand) {
      some = {some_rows.begin * plan.columns, some_rows.end * plan.columns};
      all = {all_rows.begin * plan.columns, all_rows.end * plan.columns};
    } else {
      if (p.of.row < some_rows.begin || p.of.row >= some_rows.end) continue;
      everybody = p.of.row >= all_rows.begin && p.of.row < all_rows.end;
    }
    const Run here = {p.of.first, p.of.first + p.count};
    const int64_t shift = p.at - p.of.first;
    some = intersect(some, here);
    all = intersect(all, here);
    if (!everybody || !all.size()) {
      view.add(some.begin + shift, some.end + shift, &p);
      continue;
    }
    view.add(some.begin + shift, all.begin + shift, &p);
    view.add(all.begin + shift, all.end + shift, nullptr);
    view.add(all.end + shift, some.end + shift, &p);
  }
}

inline void find_lanes(const TilePlan& plan, const Box& box, Side side, Slots& slots, int64_t u, const Seen& seen) {
  if (slots.lanes_of == u && slots.lanes_seen == seen) return;
  slots.lanes_of = u;
  slots.lanes_seen = seen;
  const GridWindows& w = box.group->side[side];
  for (int64_t lane = 0; lane < slots.lanes; ++lane) {
    const int64_t slot = u * slots.lanes + lane, f = slots.f[slot];
    const bool sees = seen.row[f] >= 0;
    const int64_t row = sees ? seen.row[f] * plan.rows + slots.y[slot] : 0;
    const int64_t column = sees ? seen.column[f] * plan.columns + slots.x[slot] : 0;
    slots.row_begin[lane] = sees ? w.row_begin[row] : 0;
    slots.row_end[lane] = sees ? w.row_end[row] : 0;
    slots.column_begin[lane] = w.column_begin[column];
    slots.column_end[lane] = w.column_end[column];
  }
}

// Of one vector of a unit's slots: which of them see a token of the tile in this piece.
struct LaneMask {
  vi begin, end;

  VDCORE_INLINE LaneMask(const TilePlan& plan, const Box& box, Side side, Slots& slots, int64_t u, int64_t lane,
                         const Piece& p) {
    find_lanes(plan, box, side, slots, u, p.of.seen);
    const vi shift = splat(p.at - p.of.first);
    const vi row_begin = load(slots.row_begin + lane), row_end = load(slots.row_end + lane);
    if (p.of.row == Segment::kBand) {
      const vi across = splat(static_cast<int32_t>(plan.columns));
      begin = row_begin * across + shift;
      end = row_end * across + shift;
      return;
    }
    const vi row = splat(p.of.row);
    begin = load(slots.column_begin + lane) + shift;
    end = (load(slots.column_end + lane) + shift) & ((row_begin <= row) & (row_end > row));
  }

  VDCORE_INLINE vi sees(int64_t token) const {
    const vi j = splat(static_cast<int32_t>(token));
    return (begin <= j) & (end > j);
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
