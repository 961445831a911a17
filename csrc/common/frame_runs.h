// Which frames a frame sees: the C++ twin of vdcore.FrameMask, shared by every native engine.
#pragma once

#include "common/tensor_view.h"

namespace vdcore {

// Half-open range of frames.
struct Run {
  int64_t begin = 0, end = 0;
  VDCORE_INLINE int64_t size() const { return end > begin ? end - begin : 0; }
};

VDCORE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VDCORE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

VDCORE_INLINE Run intersect(Run a, Run b) { return {larger(a.begin, b.begin), smaller(a.end, b.end)}; }

// past, future: chunks seen before and after one's own, -1 for all of them; sink: first frames that never fall out of
// the past window.
struct WindowMask {
  int64_t past = -1, future = -1, chunk = 1, sink = 0;

  VDCORE_INLINE bool full() const { return past < 0 && future < 0; }

  // Visible key frames of the query frame with index `frame` among the keys: the sink run, then the window. Disjoint
  // and sorted; either may be empty. `keys` is the number of valid key frames.
  VDCORE_INLINE void visible(int64_t frame, int64_t keys, Run& sink_run, Run& window) const {
    visible_of_chunk(frame / chunk, keys, sink_run, window);
  }
  // `c`: the query frame's chunk; of it all frames see the same.
  VDCORE_INLINE void visible_of_chunk(int64_t c, int64_t keys, Run& sink_run, Run& window) const {
    const int64_t end = future < 0 || c + future >= keys ? keys : smaller(keys, (c + future + 1) * chunk);
    const int64_t begin = past < 0 || past > c ? 0 : smaller((c - past) * chunk, end);
    window = {begin, end};
    sink_run = {0, smaller(sink, begin)};
  }

  // Query frames, counted from 0 for the first one at `start`, that see key frame `key`: always one run, because the
  // window moves forward only and a sink frame stays visible once it is.
  VDCORE_INLINE Run seen_by(int64_t key, int64_t start, int64_t queries) const {
    return seen_by_of_chunk(key / chunk, key, start, queries);
  }
  VDCORE_INLINE Run seen_by_of_chunk(int64_t c, int64_t key, int64_t start, int64_t queries) const {
    const int64_t first = future < 0 || c < future ? 0 : (c - future) * chunk;
    const int64_t last = past < 0 || key < sink ? start + queries : (c + past + 1) * chunk;
    return {larger(first - start, 0), smaller(last - start, queries)};
  }
};

// A window; or teacher forcing, with `clean` frames of the clean half; or a window beside the first frame of one's
// shot. See vdcore/mask.py for the definition.
struct FrameMask : WindowMask {
  int64_t clean = 0;
  const int64_t* shots = nullptr;  // first frames, ascending
  int64_t shot_count = 0;

  // Visible key frames of query frame `frame`: two runs, disjoint and sorted, either of which may be empty.
  VDCORE_INLINE void visible(int64_t frame, int64_t keys, Run& low, Run& window) const {
    if (clean) {
      const bool noisy = frame >= clean;
      const int64_t own = chunk_of(frame), begin = past < 0 || past > own ? 0 : (own - past) * chunk;
      low = cut({begin, noisy ? own * chunk : end_of(own)}, keys);
      window = noisy ? cut({clean + own * chunk, clean + end_of(own)}, keys) : Run{low.end, low.end};
      return;
    }
    WindowMask::visible(frame, keys, low, window);
    const int64_t shot = shots_until(frame) - 1;
    if (shot >= 0 && shots[shot] < window.begin) low = {shots[shot], shots[shot] + 1};
  }

  // Query frames that see key frame `key`, as WindowMask counts them.
  VDCORE_INLINE Run seen_by(int64_t key, int64_t start, int64_t queries) const {
    if (clean) {
      const int64_t own = chunk_of(key), half = key < clean ? 0 : clean;
      const int64_t end = half ? end_of(own) : seen_until(own);
      return {larger(half + own * chunk - start, 0), smaller(half + end - start, queries)};
    }
    Run run = WindowMask::seen_by(key, start, queries);
    const int64_t after = shots_until(key);
    if (after > 0 && shots[after - 1] == key) {
      const int64_t next = after < shot_count ? shots[after] : start + queries;
      run.end = larger(run.end, smaller(next - start, queries));
    }
    return run;
  }
  // And, with `clean`, the noisy ones that see a clean frame.
  VDCORE_INLINE Run also_seen_by(int64_t key, int64_t start, int64_t queries) const {
    if (!clean || key >= clean) return {};
    const int64_t own = chunk_of(key);
    const Run run = {larger(clean + end_of(own) - start, 0), smaller(clean + seen_until(own) - start, queries)};
    return run.size() ? run : Run{};
  }

 private:
  VDCORE_INLINE int64_t chunk_of(int64_t frame) const { return (frame < clean ? frame : frame - clean) / chunk; }
  VDCORE_INLINE int64_t end_of(int64_t c) const { return smaller((c + 1) * chunk, clean); }
  VDCORE_INLINE int64_t seen_until(int64_t c) const {  // the clean half's frames whose window holds a chunk of it
    return past < 0 || past > clean ? clean : smaller((c + past + 1) * chunk, clean);
  }
  VDCORE_INLINE static Run cut(Run run, int64_t keys) { return {smaller(run.begin, keys), smaller(run.end, keys)}; }
  VDCORE_INLINE int64_t shots_until(int64_t frame) const {
    int64_t low = 0, high = shot_count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (shots[middle] <= frame ? low : high) = shots[middle] <= frame ? middle + 1 : middle;
    }
    return low;
  }
};

}  // namespace vdcore
