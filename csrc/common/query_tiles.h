// Tiles of query tokens that all see the same keys, and the walk over these keys in tiles: index arithmetic that a GPU
// block does for itself, because lengths may live on the device. 32 bits: a sample has less than 2^31 tokens.
#pragma once

#include "common/frame_runs.h"

namespace vdcore {

struct TokenSpan {
  int32_t begin = 0, end = 0;
  VDCORE_INLINE int32_t size() const { return end > begin ? end - begin : 0; }
};

// Query tokens [start, start + rows) of the video, counted through all frames, or of the text. The first `live` of them
// see the key tokens of `sink` and `window`, which are disjoint, and of `text`; the others see nothing.
struct QueryTile {
  bool of_text = false;
  int32_t start = 0, rows = 0, live = 0;
  TokenSpan sink, window, text;
};

struct QueryTiles {
  WindowMask mask;
  int32_t queries = 0, keys = 0;  // frames
  int32_t tokens = 0;             // a frame
  int32_t text = 0;               // tokens of text
  int32_t q_start = 0;
  int32_t group = 1;  // frames that a tile may reach over: a chunk of the mask, or 1
  int32_t rows = 1;   // of a tile
  int32_t side = 1;   // tiles that are taken side by side: of one group, which may end with empty ones
  bool text_sees_video = true;

  VDCORE_INLINE int32_t first_group() const { return q_start / group; }
  VDCORE_INLINE int32_t groups() const { return (q_start + queries - 1) / group - first_group() + 1; }
  VDCORE_INLINE int32_t per_group() const { return even(tiles_of((group < queries ? group : queries) * tokens)); }
  // Some are empty where the first or the last chunk is cut.
  VDCORE_INLINE int32_t video_tiles() const { return groups() * per_group(); }
  VDCORE_INLINE int32_t count() const { return video_tiles() + even(tiles_of(text)); }

  // The tile with this index, of a sample with so many valid frames and text tokens.
  VDCORE_INLINE QueryTile at(int32_t index, int32_t frames_valid, int32_t text_valid) const {
    QueryTile tile;
    const int32_t valid = clamp(frames_valid, keys);
    tile.text = {0, clamp(text_valid, text)};
    if (index >= video_tiles()) {
      tile.of_text = true;
      tile.start = (index - video_tiles()) * rows;
      tile.rows = clamp(text - tile.start, rows);
      tile.live = clamp(tile.text.end - tile.start, rows);
      tile.window = {0, text_sees_video ? valid * tokens : 0};
    } else {
      const int32_t c = first_group() + index / per_group(), offset = index % per_group() * rows;
      const int32_t first = c * group > q_start ? c * group : q_start;
      const int32_t end = (c + 1) * group < q_start + queries ? (c + 1) * group : q_start + queries;
      const int32_t last = clamp(frames_valid, end);
      tile.start = (first - q_start) * tokens + offset;
      tile.rows = clamp((end - first) * tokens - offset, rows);
      tile.live = clamp((last - first) * tokens - offset, rows);
      Run sink, window;
      mask.visible_of_chunk(first / static_cast<int32_t>(mask.chunk), valid, sink, window);  // at most all frames
      if (sink.end == window.begin) window.begin = sink.begin, sink.end = sink.begin;
      tile.sink = span(sink);
      tile.window = span(window);
    }
    if (!tile.live) tile.sink = tile.window = tile.text = {};
    if (!tile.sink.size() && !tile.window.size() && !tile.text.size()) tile.live = 0;
    return tile;
  }

 private:
  VDCORE_INLINE int32_t tiles_of(int32_t n) const { return (n + rows - 1) / rows; }
  VDCORE_INLINE int32_t even(int32_t n) const { return (n + side - 1) / side * side; }
  VDCORE_INLINE static int32_t clamp(int32_t n, int32_t most) { return n < 0 ? 0 : n < most ? n : most; }
  VDCORE_INLINE TokenSpan span(Run frames) const {
    if (frames.end <= frames.begin) return {};
    return {static_cast<int32_t>(frames.begin) * tokens, static_cast<int32_t>(frames.end) * tokens};
  }
};

// Keys [start, start + rows) of the video or of the text.
struct KeyTile {
  bool of_text = false;
  int32_t start = 0, rows = 0;
};

// The keys of a query tile in tiles of at most kRows, each inside one run, or inside one frame of a run where frames do
// not follow one another in memory.
template <int kRows>
struct KeyWalk {
  TokenSpan sink, window, text;
  int32_t frame;  // tokens that a tile must stay inside of, 0: of the run
  int32_t sink_tiles, window_tiles, count;

  VDCORE_INLINE KeyWalk(const QueryTile& tile, int32_t frame_tokens)
      : sink(tile.sink), window(tile.window), text(tile.text), frame(frame_tokens) {
    sink_tiles = tiles_of(sink);
    window_tiles = tiles_of(window);
    count = sink_tiles + window_tiles + (text.size() + kRows - 1) / kRows;
  }

  VDCORE_INLINE KeyTile at(int32_t i) const {
    if (i < sink_tiles) return inside(sink, i);
    i -= sink_tiles;
    if (i < window_tiles) return inside(window, i);
    const int32_t start = (i - window_tiles) * kRows;
    return {true, start, text.end - start < kRows ? text.end - start : kRows};
  }

 private:
  VDCORE_INLINE int32_t per_frame() const { return (frame + kRows - 1) / kRows; }
  VDCORE_INLINE int32_t tiles_of(TokenSpan run) const {
    return frame ? run.size() / frame * per_frame() : (run.size() + kRows - 1) / kRows;
  }
  VDCORE_INLINE KeyTile inside(TokenSpan run, int32_t i) const {
    int32_t start = run.begin, end = run.end;
    if (frame) {
      start += i / per_frame() * frame;
      end = start + frame;
      i %= per_frame();
    }
    start += i * kRows;
    return {false, start, end - start < kRows ? end - start : kRows};
  }
};

}  // namespace vdcore
