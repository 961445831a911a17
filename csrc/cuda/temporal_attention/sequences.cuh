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

// Where a query row's number is in (B, T, S, H).
VDCORE_DEVICE int64_t row_index(const TemporalAttention& a, const Sequence& at, int frame) {
  return ((static_cast<int64_t>(at.b) * a.frames.queries + frame) * a.positions + at.s) * a.heads + at.h;
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
  // Where the row's angles are.
  VDCORE_DEVICE int64_t angles(const NormRope& how, int64_t first, int h) const {
    return angles_at(how, sequence, first, frame[0]) + (h ? 8 * how.table_t : 0);
  }

  // Whether row half h sees column 2 c + e of tile n of the other side.
  VDCORE_DEVICE bool sees(const Seen (&seen)[2], int n, int h, int e) const {
    return seen[h](8 * n + 2 * lane_column() + e);
  }

  // Row r of tile n of the other side.
  VDCORE_DEVICE bool has_other(int n, int count) const { return there && 8 * n + lane_row() < count; }
  // Loads it; tiles come one after another, from `next` = first_other(x) on.
  VDCORE_DEVICE const char* first_other(const Tokens& x) const { return other.row(x, lane_row()); }
  template <int C>
  VDCORE_DEVICE void load_other(Rows<C>& rows, const Tokens& x, const char*& next, int n, int count, int D) const {
    load_rows(rows, next, has_other(n, count), D);
    next += 8 * x.t;
  }
  template <int M, int C>
  VDCORE_DEVICE void load_others(Rows<C> (&rows)[M], const Tokens& x, int count, int D) const {
    const char* next = first_other(x);
    unroll<M>([&](int n) { load_other(rows[n], x, next, n, count, D); });
  }
};

// Sums of the tile's rows, times a factor each, to `to`; `final`: whose sums are.
template <typename E, int C>
VDCORE_DEVICE void store_tile(const RowSums<C>& sums, const float (&factor)[2], const Tokens& to,
                              const SequenceTile& tile, const bool (&final)[2], int D) {
  unroll<2>([&](int h) { store_rows<E>(sums, h, factor[h], tile.row(to, h), final[h], D); });
}

}  // namespace vdcore::cuda
