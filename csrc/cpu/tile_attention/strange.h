// Rows of the other side that are met one by one: those with values that are no numbers, and samples for a mean.
#pragma once

#include "cpu/tile_attention/boxes.h"

namespace vdcore::cpu::VDCORE_ISA {

// ---- Values that are no numbers ----------------------------------------------------------------------------------

// Rows that hold infinity or NaN are taken out of products, where 0 times them would reach tokens that do not see them,
// and are added one by one to those that do.
struct StrangeRows {
  int32_t rows[kOtherTile];
  int64_t count = 0;

  void find(Tile tile, int64_t tokens) {
    count = 0;
    vf total = {};
    for (int64_t j = 0; j < tokens; ++j) {
      const float* at = tile.at(j, 0).data;
      for (int64_t c = 0; c < tile.row; c += W) total += load(at + c) * 0.f;
    }
    float lanes[W];
    store(lanes, total);
    float sum = 0;
    for (float x : lanes) sum += x;
    if (sum == 0) return;
    for (int64_t j = 0; j < tokens; ++j) {
      const float* at = tile.at(j, 0).data;
      bool strange = false;
      for (int64_t c = 0; c < tile.row; ++c) strange |= !(at[c] * 0.f == 0.f);
      if (strange) rows[count++] = static_cast<int32_t>(j);
    }
  }
  void take_out(Tile tile) const {
    for (int64_t i = 0; i < count; ++i) memset(tile.at(rows[i], 0).data, 0, tile.row * sizeof(float));
  }
};

VDCORE_INLINE int32_t token_of(const OtherTile& tile, int64_t j, const Piece*& piece) {
  int64_t i = 0;
  while (i + 1 < tile.count && tile.pieces[i + 1].at <= j) ++i;
  piece = &tile.pieces[i];
  return static_cast<int32_t>(j - piece->at);
}

// Calls add(token of the tile, lane, channel, value) for the strange rows and those of a unit that see them.
template <typename Add>
inline void add_strange(const TilePlan& plan, const Box& box, Side side, Slots& slots, int64_t u, const OtherTile& tile,
                        const UnitView& view, const StrangeRows& strange, const FrameSegment* segments,
                        TensorView FrameSegment::* of, int64_t head, Tile stage, const Add& add) {
  for (int64_t s = 0; s < strange.count; ++s) {
    const int64_t j = strange.rows[s];
    bool seen = false, edge = false;
    for (int64_t i = 0; i < view.part_count; ++i)
      if (j >= view.parts[i].begin && j < view.parts[i].end) seen = true, edge = view.parts[i].piece;
    if (!seen) continue;
    const Piece* p;
    const int64_t offset = token_of(tile, j, p);
    gather_run(segments[p->of.tokens.text].*of, box.sample, head, piece(p->of.tokens, offset, 1), stage);
    for (int64_t lane = 0; lane < slots.filled[u]; ++lane) {
      if (edge) {
        float sees[W];
        const LaneMask mask(plan, box, side, slots, u, lane / W * W, *p);
        store(sees, select(mask.sees(j), splat(1.f), vf{}));
        if (sees[lane % W] == 0) continue;
      }
      for (int64_t c = 0; c < stage.row; ++c) add(j, lane, c, stage.data[c]);
    }
  }
}

// ---- Means -------------------------------------------------------------------------------------------------------

// mean = of some of the rows that the whole box sees, evenly spread: what not everybody sees may be NaN. 0 where there
// are none. square: the mean of their squares, optional. Returns how many these were.
inline int64_t mean_of_common(const TilePlan& plan, const Box& box, Side side, int64_t list,
                              const FrameSegment* segments, TensorView FrameSegment::* of, int64_t head, int64_t most,
                              Tile stage, float* mean, float* square) {
  const int64_t row = stage.row;
  memset(mean, 0, row * sizeof(float));
  if (square) memset(square, 0, row * sizeof(float));
  int64_t seen = 0, count = 0, next = 0, before = 0;
  for_segments(plan, box, side, list, true, [&](const Segment& s) { seen += s.tokens.size(); });
  if (!seen) return 0;
  const int64_t step = (seen + most - 1) / most;
  for_segments(plan, box, side, list, true, [&](const Segment& s) {
    for (; next < before + s.tokens.size(); next += step, ++count) {
      gather_run(segments[s.tokens.text].*of, box.sample, head, piece(s.tokens, next - before, 1), stage);
      for (int64_t c = 0; c < row; c += W) {
        const vf x = load(stage.data + c);
        store(mean + c, load(mean + c) + x);
        if (square) store(square + c, load(square + c) + x * x);
      }
    }
    before += s.tokens.size();
  });
  for (int64_t c = 0; c < row; c += W) {
    store(mean + c, load(mean + c) / static_cast<float>(count));
    if (square) store(square + c, load(square + c) / static_cast<float>(count));
  }
  return count;
}

}  // namespace vdcore::cpu::VDCORE_ISA
