// What frames see of one another, and the sizes of units and boxes that cost least for it.
//
// A box is what one gathering of the other side serves; its units are what that is computed for: up to three vectors of
// tokens, a few rows of a few columns of a few frames, so that the windows of a unit's tokens overlap well: those of
// the same place in frames that follow one another overlap best.
#pragma once

#include "cpu/core/softmax.h"
#include "cpu/tile_attention/tile_attention.h"

namespace vdcore::cpu::VDCORE_ISA {

enum Side : int { kQueries = 0, kKeys = 1 };

constexpr int64_t kMostLanes = 3 * W;                          // of a unit
constexpr int64_t kBoxTokens = 384 / kMostLanes * kMostLanes;  // shares one gathering of the other side
constexpr int64_t kMostUnits = kBoxTokens / W;
constexpr int64_t kMostFrames = 8;  // of a box

// How frames of a box see one frame of the other side: steps of the tables of rows and columns, -1 for one that does
// not.
struct Seen {
  int16_t row[kMostFrames], column[kMostFrames];

  VDCORE_INLINE bool operator==(const Seen& other) const { return !memcmp(this, &other, sizeof other); }
};

// Sizes of boxes and units of one side of a group.
struct Shape {
  int32_t frames, unit_rows, unit_columns, box_rows, box_columns;
};

// ---- What frames see ---------------------------------------------------------------------------------------------

// Calls body(other frame, seen) for the frames of the other side below `limit` that some of frames [first, end) see, in
// order; end - first is at most kMostFrames.
template <typename Body>
VDCORE_INLINE void for_seen_frames(const GridWindows& w, int64_t first, int64_t end, int64_t limit, const Body& body) {
  const int64_t frames = end - first;
  int64_t next[kMostFrames];
  for (int64_t i = 0; i < frames; ++i) next[i] = w.first[first + i];
  for (;;) {
    int64_t frame = limit;
    for (int64_t i = 0; i < frames; ++i)
      if (next[i] < w.first[first + i + 1]) frame = smaller(frame, w.windows[next[i]].frame);
    if (frame >= limit) return;
    Seen seen;
    memset(&seen, -1, sizeof seen);
    for (int64_t i = 0; i < frames; ++i) {
      if (next[i] == w.first[first + i + 1] || w.windows[next[i]].frame != frame) continue;
      seen.row[i] = w.windows[next[i]].row_step;
      seen.column[i] = w.windows[next[i]++].column_step;
    }
    body(frame, seen);
  }
}

// Of an axis's places, which tokens from one place to another, of so many frames, see: somebody, and everybody.
VDCORE_INLINE void seen_places(const int32_t* begin, const int32_t* end, int64_t size, const int16_t* steps,
                               int64_t frames, int64_t from, int64_t last, Run& some, Run& all) {
  some = {size, 0};
  all = {0, size};
  for (int64_t i = 0; i < frames; ++i) {
    if (steps[i] < 0) {
      all.end = 0;
      continue;
    }
    const int64_t at = steps[i] * size;
    some = {smaller(some.begin, begin[at + from]), larger(some.end, end[at + last])};
    all = {larger(all.begin, begin[at + last]), smaller(all.end, end[at + from])};
  }
}

VDCORE_INLINE void seen_rows(const TilePlan& plan, const GridWindows& w, const Seen& seen, int64_t frames, int64_t from,
                             int64_t last, Run& some, Run& all) {
  seen_places(w.row_begin, w.row_end, plan.rows, seen.row, frames, from, last, some, all);
}

VDCORE_INLINE void seen_columns(const TilePlan& plan, const GridWindows& w, const Seen& seen, int64_t frames,
                                int64_t from, int64_t last, Run& some, Run& all) {
  seen_places(w.column_begin, w.column_end, plan.columns, seen.column, frames, from, last, some, all);
}

// ---- Shapes ------------------------------------------------------------------------------------------------------

// What so many frames about the middle see: a few of the other side's frames stand for all of them.
class SeenSamples {
 public:
  SeenSamples(const TilePlan& plan, const GridWindows& windows, int64_t of, int64_t frames)
      : plan_(plan), windows_(windows) {
    const int64_t first = of / 2 / frames * frames, end = smaller(first + frames, of);
    frames_ = end - first;
    int64_t all = 0, index = 0;
    for_seen_frames(windows, first, end, INT64_MAX, [&](int64_t, const Seen&) { ++all; });
    const int64_t step = (all + kMost - 1) / kMost;
    for_seen_frames(windows, first, end, INT64_MAX, [&](int64_t, const Seen& seen) {
      if (index++ % step) return;
      if (!count_ || !(seen_[count_ - 1] == seen)) {
        weights_[count_] = 0;
        seen_[count_++] = seen;
      }
      weights_[count_ - 1] += static_cast<double>(step);
    });
  }

  // Tokens of the other side that blocks of so many rows and columns see, all together, for each frame of a block.
  double tokens(int64_t height, int64_t width) const {
    double total = 0;
    Run some, all;
    for (int64_t i = 0; i < count_; ++i) {
      int64_t rows = 0, columns = 0;
      for (int64_t y = 0; y < plan_.rows; y += height) {
        seen_rows(plan_, windows_, seen_[i], frames_, y, smaller(y + height, plan_.rows) - 1, some, all);
        rows += some.size();
      }
      for (int64_t x = 0; x < plan_.columns; x += width) {
        seen_columns(plan_, windows_, seen_[i], frames_, x, smaller(x + width, plan_.columns) - 1, some, all);
        columns += some.size();
      }
      total += weights_[i] * static_cast<double>(rows) * static_cast<double>(columns);
    }
    return total / static_cast<double>(frames_);
  }

 private:
  static constexpr int64_t kMost = 16;
  const TilePlan& plan_;
  const GridWindows& windows_;
  int64_t frames_ = 0, count_ = 0;
  Seen seen_[kMost];
  double weights_[kMost];
};

// The least work: tokens of the other side that units of this shape see, times the vectors they are computed in. A
// product of units of one or two vectors loads more operands, 17 for 16 multiplications of vectors and 14 for 24, where
// one of three loads 11 for 24. Measured with AVX-512 at 64 channels, float32 and bfloat16, ten shapes on two masks:
// time a pair of a unit's own, over that of units of three vectors, 1.20 to 1.26 and 1.04 to 1.08.
inline Shape best_shape(const TilePlan& plan, const GridWindows& windows, int64_t of) {
  constexpr double kVectorCost[4] = {0, 1.23, 1.06, 1};
  const int64_t rows = plan.rows, columns = plan.columns;
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  Shape best = {};
  double least = -1;
  for (int64_t frames = 1; frames <= kMostFrames && frames < 2 * of; frames *= 2) {
    const SeenSamples seen(plan, windows, of, frames);
    for (int64_t n = 1; n <= 3; ++n) {
      const int64_t places = n * W / frames;  // of a frame
      for (int64_t height = 1; height <= smaller(rows, places); ++height) {
        const int64_t width = smaller(places / height, columns), vectors = (frames * height * width + W - 1) / W;
        if (height > 4 && places % height && height != rows) continue;
        const double here = seen.tokens(height, width) * static_cast<double>(vectors) * kVectorCost[vectors];
        if (least >= 0 && here >= least * 0.999) continue;
        least = here;
        best = {narrow(frames), narrow(height), narrow(width), 0, 0};
      }
    }
  }
  const SeenSamples seen(plan, windows, of, best.frames);
  const int64_t units = kBoxTokens / round_up(int64_t{best.frames} * best.unit_rows * best.unit_columns);
  least = -1;
  for (int64_t down = 1; down <= units; ++down) {
    const int64_t height = smaller(down * best.unit_rows, rows),
                  width = smaller(units / down * best.unit_columns, columns);
    const double here = seen.tokens(height, width);
    if (least < 0 || here < least * 0.999) {
      least = here;
      best.box_rows = narrow(height);
      best.box_columns = narrow(width);
    }
    if (height == rows) break;
  }
  return best;
}

}  // namespace vdcore::cpu::VDCORE_ISA
