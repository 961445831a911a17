#include "common/tile_plan.h"

#include <algorithm>
#include <cstdlib>

namespace vdcore {
namespace {

// [begin, end) of every place of an axis, for every step.
struct AxisTables {
  const int32_t* table[4];  // begin and end as a query sees keys, then as a key is seen by queries
};

AxisTables axis_tables(OwnedPlan& owned, const std::vector<RadiusStep>& steps, int64_t size, int64_t tile,
                       bool shifted) {
  const auto entries = static_cast<size_t>(size) * (steps.size() + 1);  // the last step: everything, for sinks
  AxisTables found;
  int32_t* table[4];
  for (int i = 0; i < 4; ++i) {
    owned.ints.push_back(std::make_unique<int32_t[]>(std::max<size_t>(entries, 1)));
    found.table[i] = table[i] = owned.ints.back().get();
  }
  const int64_t n = (size + tile - 1) / tile;
  for (size_t s = 0; s <= steps.size(); ++s) {
    const int64_t radius = s < steps.size() ? steps[s].radius : -1;
    int32_t* at[4];
    for (int i = 0; i < 4; ++i) at[i] = table[i] + static_cast<int64_t>(s) * size;
    for (int64_t x = 0; x < size; ++x) {
      int64_t place = x / tile;
      const bool all = radius < 0 || radius >= n || (shifted && 2 * radius + 1 >= n);
      if (shifted && !all) place = std::min(std::max(place, radius), n - 1 - radius);
      at[0][x] = static_cast<int32_t>(all ? 0 : std::max<int64_t>(place - radius, 0) * tile);
      at[1][x] = static_cast<int32_t>(all ? size : std::min((place + radius + 1) * tile, size));
    }
    // Begin and end grow with the place: those that see a key follow one another.
    for (int64_t y = 0; y < size; ++y) {
      at[2][y] = static_cast<int32_t>(std::upper_bound(at[1], at[1] + size, static_cast<int32_t>(y)) - at[1]);
      at[3][y] = static_cast<int32_t>(std::upper_bound(at[0], at[0] + size, static_cast<int32_t>(y)) - at[0]);
    }
  }
  return found;
}

int16_t step_of(const std::vector<RadiusStep>& steps, int64_t distance) {
  size_t s = 0;
  while (s + 1 < steps.size() && steps[s + 1].first <= distance) ++s;
  return static_cast<int16_t>(s);
}

int64_t* longs(OwnedPlan& owned, int64_t count) {
  owned.longs.push_back(std::make_unique<int64_t[]>(static_cast<size_t>(std::max<int64_t>(count, 1))));
  return owned.longs.back().get();
}

// Rows of (place, value) pairs by place: first (count + 1,) and the values in order.
template <typename Value, typename Own>
void by_place(OwnedPlan& owned, Own& own, const std::vector<std::pair<int64_t, Value>>& pairs, int64_t count,
              const int64_t** first, const Value** values) {
  int64_t* starts = longs(owned, count + 1);
  std::fill(starts, starts + count + 1, 0);
  for (const auto& pair : pairs) ++starts[pair.first + 1];
  for (int64_t i = 0; i < count; ++i) starts[i + 1] += starts[i];
  own.push_back(std::make_unique<Value[]>(std::max<size_t>(pairs.size(), 1)));
  Value* out = own.back().get();
  std::vector<int64_t> next(starts, starts + count);
  for (const auto& pair : pairs) out[next[static_cast<size_t>(pair.first)]++] = pair.second;
  *first = starts;
  *values = out;
}

void set_live(OwnedPlan& owned, const GridSizes& sizes, const int64_t* lengths, int64_t text,
              const int64_t* text_lengths) {
  int64_t* live[3];
  for (int64_t*& x : live) x = longs(owned, sizes.batch);
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const int64_t most = std::max(sizes.keys, sizes.q_start + sizes.queries);
    const int64_t n = lengths ? std::min(std::max<int64_t>(lengths[b], 0), most) : most;
    live[0][b] = std::min(std::max<int64_t>(n - sizes.q_start, 0), sizes.queries);
    live[1][b] = std::min(n, sizes.keys);
    live[2][b] = text_lengths ? std::min(std::max<int64_t>(text_lengths[b], 0), text) : text;
  }
  owned.plan.live[0] = live[0];
  owned.plan.live[1] = live[1];
  owned.plan.text_live = live[2];
}

void set_sizes(TilePlan& plan, const GridSizes& sizes, int64_t text) {
  plan.batch = sizes.batch;
  plan.frames[0] = sizes.queries;
  plan.frames[1] = sizes.keys;
  plan.rows = sizes.rows;
  plan.columns = sizes.columns;
  plan.text = text;
}

}  // namespace

OwnedPlan plan_of_windows(const GridSizes& sizes, const std::vector<WindowsOfHeads>& groups, const int64_t* lengths,
                          int64_t text, const int64_t* text_lengths, bool text_sees_video) {
  OwnedPlan owned;
  set_sizes(owned.plan, sizes, text);
  owned.plan.text_sees_video = text_sees_video;
  set_live(owned, sizes, lengths, text, text_lengths);
  int64_t head = 0;
  for (const WindowsOfHeads& w : groups) {
    HeadGroup group = {head, head + w.heads, {}};
    head += w.heads;
    const AxisTables rows = axis_tables(owned, w.rows, sizes.rows, w.tile[1], w.shifted);
    const AxisTables columns = axis_tables(owned, w.columns, sizes.columns, w.tile[2], w.shifted);
    std::vector<std::pair<int64_t, SeenFrame>> sees[2];
    for (int64_t t = 0; t < sizes.queries; ++t)
      for (const Run& run : w.frame_runs[static_cast<size_t>(t)])
        for (int64_t g = run.begin; g < run.end; ++g) {
          const int64_t d = std::abs((sizes.q_start + t) / w.tile[0] - g / w.tile[0]);
          const bool whole = g < w.sink;
          const auto row = whole ? static_cast<int16_t>(w.rows.size()) : step_of(w.rows, d);
          const auto column = whole ? static_cast<int16_t>(w.columns.size()) : step_of(w.columns, d);
          sees[0].push_back({t, {static_cast<int32_t>(g), row, column}});
          sees[1].push_back({g, {static_cast<int32_t>(t), row, column}});
          const int64_t y = row * sizes.rows + sizes.rows / 2, x = column * sizes.columns + sizes.columns / 2;
          owned.pairs += static_cast<double>(sizes.batch * w.heads * sizes.rows * sizes.columns) *
                         (rows.table[1][y] - rows.table[0][y]) * (columns.table[1][x] - columns.table[0][x]);
        }
    for (int side = 0; side < 2; ++side) {
      GridWindows& windows = group.side[side];
      by_place(owned, owned.windows, sees[side], owned.plan.frames[side], &windows.first, &windows.windows);
      windows.row_begin = rows.table[2 * side];
      windows.row_end = rows.table[2 * side + 1];
      windows.column_begin = columns.table[2 * side];
      windows.column_end = columns.table[2 * side + 1];
    }
    owned.groups.push_back(group);
  }
  owned.plan.groups = owned.groups.data();
  owned.plan.group_count = static_cast<int64_t>(owned.groups.size());
  return owned;
}

OwnedPlan plan_of_lists(const GridSizes& sizes, const int64_t* tile, int64_t list_batch, int64_t list_heads, int64_t K,
                        const int32_t* indices, const int32_t* counts) {
  OwnedPlan owned;
  TilePlan& plan = owned.plan;
  set_sizes(plan, sizes, 0);
  set_live(owned, sizes, nullptr, 0, nullptr);
  const int64_t extent[3] = {sizes.queries, sizes.rows, sizes.columns};
  for (int axis = 0; axis < 3; ++axis) {
    plan.tile[axis] = tile[axis];
    plan.tiles[axis] = (extent[axis] + tile[axis] - 1) / tile[axis];
  }
  plan.list_batch = list_batch;
  plan.list_heads = list_heads;
  const int64_t n = plan.tile_count(), lists = list_batch * list_heads;
  // Places are (list, tile), with one more in each list for its end: first is then (lists, n + 1).
  std::vector<std::pair<int64_t, int32_t>> sees[2];
  for (int64_t i = 0; i < lists; ++i)
    for (int64_t t = 0; t < n; ++t)
      for (int64_t j = 0; j < counts[i * n + t]; ++j) {
        const int32_t other = indices[(i * n + t) * K + j];
        sees[0].push_back({i * (n + 1) + t, other});
        sees[1].push_back({i * (n + 1) + other, static_cast<int32_t>(t)});
      }
  for (int side = 0; side < 2; ++side)
    by_place(owned, owned.ints, sees[side], lists * (n + 1), &plan.listed[side].first, &plan.listed[side].tiles);
  const double share = static_cast<double>(sees[0].size()) / static_cast<double>(std::max<int64_t>(lists, 1));
  const double area =
      static_cast<double>(std::min(tile[0], extent[0]) * std::min(tile[1], extent[1]) * std::min(tile[2], extent[2]));
  owned.pairs = share * area * area * static_cast<double>(sizes.batch);  // of one head
  return owned;
}

}  // namespace vdcore
