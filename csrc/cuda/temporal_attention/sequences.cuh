// Sequences, all frames of one (position, head), and the tiles of 16 of their rows that warps take.
#pragma once

#include "cuda/core/softmax.cuh"
#include "cuda/temporal_attention/temporal_attention.h"

namespace vdcore::cuda {

struct Sequence {
  int64_t b, s;
  int32_t h;

  // Of a tensor whose heads serve `shared` of the sequence's heads each.
  VDCORE_DEVICE char* row(const Tokens& x, int frame, int shared = 1) const { return x.row(b, frame, s, h / shared); }
};

VDCORE_DEVICE Sequence sequence_at(int64_t i, int64_t positions, int32_t heads) {
  // Division of 64-bit numbers costs as much as a row's norm.
  if (i < (int64_t{1} << 31) && positions < (int64_t{1} << 31)) {
    const uint32_t n = static_cast<uint32_t>(i), p = n / static_cast<uint32_t>(heads);
    const uint32_t b = p / static_cast<uint32_t>(positions);
    return {b, p - b * static_cast<uint32_t>(positions), static_cast<int32_t>(n - p * heads)};
  }
  const int64_t p = i / heads, b = p / positions;
  return {b, p - b * positions, static_cast<int32_t>(i - p * heads)};
}

// Where a query row's number is in (B, T, S, H).
VDCORE_DEVICE int64_t row_index(const TemporalAttention& a, const Sequence& at, int frame) {
  return ((at.b * a.frames.queries + frame) * a.positions + at.s) * a.heads + at.h;
}

// Where a row's angles are, without its pairs. `first`: row of the table of frame 0.
VDCORE_DEVICE int64_t angles_at(const NormRope& how, const Sequence& at, int64_t first, int frame) {
  return (first + frame) * how.table_t + at.s * how.table_s + at.h * how.table_h;
}

// A lane's two rows of a warp's tile, r and r + 8: of one sequence, or of two of at most eight frames ("packed"). N:
// tiles of eight rows of the other side, 0 if not known to the compiler, and then nothing is packed.
template <int N>
struct SequenceTile {
  Sequence sequence[2];
  bool there[2];  // the last tile may hold one sequence, and the last block fewer than others
  int frame[2];
  bool packed;

  VDCORE_DEVICE SequenceTile(const Sequence& one, int tile)
      : sequence{one, one},
        there{true, true},
        frame{16 * tile + lane_row(), 16 * tile + 8 + lane_row()},
        packed(false) {}
  // `first`: number of the first sequence.
  VDCORE_DEVICE SequenceTile(const TemporalAttention& a, int64_t first, int tile, bool packed)
      : there{first < a.sequences, first + packed < a.sequences},
        frame{16 * tile + lane_row(), 16 * tile + (packed ? 0 : 8) + lane_row()},
        packed(packed) {
    unroll<2>([&](int h) { sequence[h] = sequence_at(there[h] ? first + h * packed : 0, a.positions, a.heads); });
  }

  VDCORE_DEVICE bool has(int h, int count) const { return there[h] && frame[h] < count; }
  VDCORE_DEVICE char* row(const Tokens& x, int h) const { return sequence[h].row(x, frame[h]); }

  // Whether row half h sees column 2 c + e of tile n of the other side. Packed sequences have a tile each.
  VDCORE_DEVICE bool sees(const Seen (&seen)[2], int n, int h, int e) const {
    return seen[h](8 * n + 2 * lane_column() + e - (packed ? 8 * h : 0));
  }

  // Row r of tile n of the other side.
  VDCORE_DEVICE bool is_second(int n) const { return N == 2 && n == 1 && packed; }
  VDCORE_DEVICE int other_frame(int n) const { return is_second(n) ? lane_row() : 8 * n + lane_row(); }
  VDCORE_DEVICE bool has_other(int n, int count) const {
    return other_frame(n) < count && (is_second(n) ? there[1] : there[0]);
  }
  // Loads it; tiles come one after another, from `next` = sequence[0].row(x, lane_row(), shared) on.
  template <int C>
  VDCORE_DEVICE void load_other(Rows<C>& rows, const Tokens& x, const char*& next, int n, int count, int shared,
                                int D) const {
    const char* row = is_second(n) ? sequence[1].row(x, lane_row(), shared) : next;
    next += 8 * x.t;
    load_rows(rows, row, has_other(n, count), D);
  }
};

// Sums of the tile's rows, times a factor each, to `to`; `final`: whose sums are.
template <typename E, int C, int N>
VDCORE_DEVICE void store_tile(const RowSums<C>& sums, const float (&factor)[2], const Tokens& to,
                              const SequenceTile<N>& tile, const bool (&final)[2], int D) {
  unroll<2>([&](int h) { store_rows<E>(sums, h, factor[h], tile.row(to, h), final[h], D); });
}

}  // namespace vdcore::cuda
