// Norm and rope of rows of any number: eight rows a warp, 16 bytes a lane. Reads and writes every row once.
#include "cuda/norm_rope.cuh"
#include "cuda/qk_norm_rope.h"

namespace vdcore::cuda {
namespace {

constexpr int kThreads = 128, kRowsPerBlock = kThreads / 32 * 8;

template <typename E, int C>
VDCORE_KERNEL(kThreads, 4)
rows_norm_rope_kernel(const RowsNormRope a) {
  int64_t i = static_cast<int64_t>(block_index()) * kRowsPerBlock + thread_index() / 32 * 8 + lane_row();
  const bool valid = i < a.rows;
  const int64_t i_h = i % a.heads, i_s = (i /= a.heads) % a.positions, i_t = (i /= a.positions) % a.frames;
  const int64_t i_b = i / a.frames;
  const char* row = a.x.row(i_b, i_t, i_s, i_h);
  Rows<C> x;
  load_rows(x, row, valid, a.head_dim);
  const int64_t table = (a.frame_start + i_t) * a.how.table_t + i_s * a.how.table_s + i_h * a.how.table_h;
  norm_rope_any<E>(x, row, valid, a.how, a.norm, table, a.head_dim);
  char* to = a.y.row(i_b, i_t, i_s, i_h) + 16 * lane_column();
  VDCORE_UNROLL
  for (int chunk = 0; chunk < C; ++chunk)
    if (valid && has_channels(chunk, a.head_dim)) store_global(to + 64 * chunk, x.x[chunk]);
}

template <typename E>
void of(const Where& where, const RowsNormRope& a) {
  const int64_t blocks = (a.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (a.head_dim <= 128) return launch(where, rows_norm_rope_kernel<E, 4>, blocks, kThreads, 0, a);
  if (a.head_dim <= 256) return launch(where, rows_norm_rope_kernel<E, 8>, blocks, kThreads, 0, a);
  launch_error(where, "at most 256 channels a head were expected");
}

}  // namespace

void rows_norm_rope(const Where& where, DType dtype, const RowsNormRope& args) {
  if (dtype == DType::bf16) return of<bf16>(where, args);
  if (dtype == DType::f16) return of<f16>(where, args);
  launch_error(where, "float16 or bfloat16 was expected");
}

}  // namespace vdcore::cuda
