// Which tokens of a grid attend to which: windows along rows and columns for every pair of frames, or lists of tiles.
// What a kernel walks through instead of a mask: nothing here is as large as the pairs of tokens.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "common/frame_runs.h"

namespace vdcore {

// A frame that a frame sees, and how far in it: steps of the tables of rows and columns.
struct SeenFrame {
  int32_t frame;
  int16_t row_step, column_step;
};

// What queries see of the keys, or keys of the queries that see them. Tables: of a step and a place, the places
// [begin, end) of the other side; both grow with the place.
struct GridWindows {
  const int64_t* first;  // (frames + 1,): of a frame's windows, in the order of the frames that it sees
  const SeenFrame* windows;
  const int32_t *row_begin, *row_end;        // (steps, rows)
  const int32_t *column_begin, *column_end;  // (steps, columns)
};

// Tiles that a tile sees, or that see it.
struct ListedTiles {
  const int64_t* first;  // (lists, n + 1)
  const int32_t* tiles;
};

struct HeadGroup {
  int64_t first_head, end_head;
  GridWindows side[2];  // of queries, of keys
};

struct TilePlan {
  int64_t batch = 0, frames[2] = {}, rows = 0, columns = 0, text = 0;  // query and key frames
  bool text_sees_video = true;
  const int64_t* live[2] = {};         // (batch,): query frames that see, key frames that are seen
  const int64_t* text_live = nullptr;  // (batch,)
  const HeadGroup* groups = nullptr;
  int64_t group_count = 0;
  // With lists, and no groups: tiles of (frames, rows, columns).
  int64_t tile[3] = {}, tiles[3] = {};
  int64_t list_batch = 0, list_heads = 0;
  ListedTiles listed[2] = {};

  VDCORE_INLINE int64_t per_frame() const { return rows * columns; }
  VDCORE_INLINE int64_t tile_count() const { return tiles[0] * tiles[1] * tiles[2]; }
  VDCORE_INLINE bool has_lists() const { return list_batch > 0; }
  VDCORE_INLINE int64_t list_of(int64_t sample, int64_t head) const {
    return (list_batch > 1 ? sample : 0) * list_heads + (list_heads > 1 ? head : 0);
  }
};

// A plan and the memory that it points to.
struct OwnedPlan {
  OwnedPlan() = default;
  OwnedPlan(OwnedPlan&&) = default;
  OwnedPlan(const OwnedPlan&) = delete;  // it points into itself

  TilePlan plan;
  std::vector<HeadGroup> groups;
  std::vector<std::unique_ptr<int64_t[]>> longs;
  std::vector<std::unique_ptr<int32_t[]>> ints;
  std::vector<std::unique_ptr<SeenFrame[]>> windows;
  double pairs = 0;  // visible ones of all heads and samples, or a little more: for the number of threads
};

// Radii by frame distance: `first` distance, `radius` from there on, -1 for all.
struct RadiusStep {
  int64_t first, radius;
};

// Windows of a group of heads, as vdcore.GridMask has them.
struct WindowsOfHeads {
  int64_t heads;
  int64_t tile[3];
  bool shifted;  // at borders of rows and columns
  int64_t sink;
  int64_t clean;                             // frames of the clean half, whose places the noisy ones have too; 0: none
  std::vector<std::vector<Run>> frame_runs;  // per query frame
  std::vector<RadiusStep> rows, columns;
};

struct GridSizes {
  int64_t batch, queries, keys, rows, columns, q_start;
};

OwnedPlan plan_of_windows(const GridSizes& sizes, const std::vector<WindowsOfHeads>& groups, const int64_t* lengths,
                          int64_t text, const int64_t* text_lengths, bool text_sees_video);

// indices (list_batch, list_heads, n, K), counts without K: in range, ascending.
OwnedPlan plan_of_lists(const GridSizes& sizes, const int64_t* tile, int64_t list_batch, int64_t list_heads, int64_t K,
                        const int32_t* indices, const int32_t* counts);

}  // namespace vdcore
