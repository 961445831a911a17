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
// the past window. See vdcore/mask.py for the definition.
struct FrameMask {
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

}  // namespace vdcore
