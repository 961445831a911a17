// Sequences, all frames of one (position, head), and the tiles of 16 of their rows that warps take.
#pragma once

#include "cuda/core/divider.h"
#include "cuda/core/softmax.cuh"
#include "cuda/temporal_attention/temporal_attention.h"

namespace vdcore::cuda {

struct Sequence {
  uint32_t b, s, h;

  VDCORE_DEVICE char* row(const Tokens& x, int frame) const { return x.row(b, static_cast<uint32_t>(frame), s, h); }
};

// Sequences by their number, heads fastest: less than 2^31 of them.
struct Sequences {
  Divider heads, positions;

  Sequences() = default;
  Sequences(int64_t heads, int64_t positions) : heads(heads), positions(positions) {}
  VDCORE_DEVICE Sequence at(uint32_t i) const {
    const uint32_t h = heads.split(i), s = positions.split(i);
    return {i, s, h};
  }
};

// Of a short line: the frames of the other side that each frame sees, a bit each.
struct SeenFrames {
  uint32_t of_query[kShortFrames] = {}, of_key[kShortFrames] = {};

  SeenFrames() = default;
  explicit SeenFrames(const Frames& f) {
    for (int t = 0; t < f.queries && t < kShortFrames; ++t) {
      Run sink, window;
      f.mask.visible(f.start + t, f.keys, sink, window);
      of_query[t] = below(sink.end) | (below(window.end) & ~below(window.begin));
    }
    for (int k = 0; k < f.keys && k < kShortFrames; ++k) {
      const Run run = f.mask.seen_by(k, f.start, f.queries);
      of_key[k] = below(run.end) & ~below(run.begin);
    }
  }
  static VDCORE_INLINE uint32_t below(int64_t frame) {
    return frame <= 0 ? 0 : frame >= 32 ? ~uint32_t{0} : (uint32_t{1} << frame) - 1;
  }
};

// What a lane's two rows of a tile see: row half h column 2 (lane % 4) + e of tile n of the other side.
struct SeenByRows {
  uint32_t rows[2], columns[2];  // all frames; those from the lane's first column on

  VDCORE_DEVICE bool operator()(int n, int h, int e) const { return (columns[h] >> (8 * n + e) & 1) != 0; }
  VDCORE_DEVICE bool any(int h) const { return rows[h] != 0; }
  VDCORE_DEVICE void of(int h, uint32_t frames) { rows[h] = frames, columns[h] = frames >> 2 * lane_column(); }
};

// Where a query row's number is in (B, T, S, H).
VDCORE_DEVICE int64_t row_index(const TemporalAttention& a, const Sequence& at, int frame) {
  return ((static_cast<int64_t>(at.b) * a.frames.queries + frame) * a.positions + at.s) * a.heads + at.h;
}

// Of a call with norm or RoPE: fused kernels read pairs for all channels.
inline void check_table(const Where& where, const TemporalAttention& a) {
  if (a.norm_rope.any() && (a.norm_rope.style != RopeStyle::interleaved || 2 * a.norm_rope.pairs != a.head_dim))
    launch_error(where, "a table of neighbouring pairs for all channels was expected");
}

// Where a row's angles are, without its pairs. `first`: row of the table of frame 0.
VDCORE_DEVICE int64_t angles_at(const NormRope& how, const Sequence& at, int64_t first, int frame) {
  return Tokens::offset(static_cast<uint32_t>(first) + frame, how.table_t) + Tokens::offset(at.s, how.table_s) +
         Tokens::offset(at.h, how.table_h);
}

// A lane's two rows of a warp's tile, r and r + 8, and the rows of the other side's tiles of eight.
struct SequenceTile {
  Sequence sequence, other;  // other: on the other side, whose heads may be shared
  bool there;                // the last block may hold fewer sequences than others
  int frame[2];

  VDCORE_DEVICE SequenceTile(const Sequence& one, int tile, bool there = true)
      : sequence(one), other(one), there(there), frame{16 * tile + lane_row(), 16 * tile + 8 + lane_row()} {}

  VDCORE_DEVICE bool has(int h, int count) const { return there && frame[h] < count; }
  VDCORE_DEVICE char* row(const Tokens& x, int h) const { return sequence.row(x, frame[0]) + (h ? 8 * x.t : 0); }
  // Where the row's angles are; of a row past the last frame the last one's.
  VDCORE_DEVICE int64_t angles(const NormRope& how, int64_t first, int h, int count) const {
    return angles_at(how, sequence, first, frame[h] < count ? frame[h] : count - 1);
  }

  // Which frames of the other side its rows see; frames past `lengths` see nothing and are not seen.
  VDCORE_DEVICE SeenByRows seen_by_queries(const SeenFrames& frames, const Frames& f) const {
    return seen_by(frames.of_query, f, f.start, 0);
  }
  VDCORE_DEVICE SeenByRows seen_by_keys(const SeenFrames& frames, const Frames& f) const {
    return seen_by(frames.of_key, f, 0, f.start);
  }

  // Whether row half h sees column 2 c + e of tile n of the other side.
  VDCORE_DEVICE bool sees(const Seen (&seen)[2], int n, int h, int e) const {
    return seen[h](8 * n + 2 * lane_column() + e);
  }

  // Row r of tile n of the other side.
  VDCORE_DEVICE bool has_other(int n, int count) const { return there && 8 * n + lane_row() < count; }
  VDCORE_DEVICE const char* other_row(const Tokens& x, int n) const {
    return other.row(x, lane_row()) + Tokens::offset(8 * n, x.t);
  }
  template <int C>
  VDCORE_DEVICE void load_other(Rows<C>& rows, const Tokens& x, int n, int count, int D) const {
    load_rows(rows, other_row(x, n), has_other(n, count), D);
  }
  VDCORE_DEVICE Vec4 load_other_chunk(const Tokens& x, int n, int i, int count, int D) const {
    return load_chunk(other_row(x, n), i, has_other(n, count), D);
  }

 private:
  VDCORE_DEVICE SeenByRows seen_by(const uint32_t (&frames)[kShortFrames], const Frames& f, int64_t start,
                                   int64_t other_start) const {
    SeenByRows seen;
    uint32_t found[2] = {frames[frame[0]], frames[frame[1]]};
    if (f.lengths) {
      const int64_t length = valid_frames(f, sequence.b);
      unroll<2>([&](int h) {
        found[h] = start + frame[h] < length ? found[h] & SeenFrames::below(length - other_start) : 0;
      });
    }
    unroll<2>([&](int h) { seen.of(h, found[h]); });
    return seen;
  }
};

// Sums of the tile's rows, times a factor each, to those of `to`, which has so many frames.
template <typename E, int C>
VDCORE_DEVICE void store_tile(const RowSums<C>& sums, const float (&factor)[2], const Tokens& to,
                              const SequenceTile& tile, int count, int D) {
  unroll<2>([&](int h) { store_rows<E>(sums, h, factor[h], tile.row(to, h), tile.has(h, count), D); });
}

}  // namespace vdcore::cuda
