// Four rows of channels at a time: a sum over one row is a chain of additions that each wait for the one before, and
// its lanes must then be added up; four rows keep the processor busy meanwhile, and share what is the same for all of
// them.
#pragma once

#include "cpu/arguments.h"
#include "cpu/tile.h"
#include "cpu/token_rows.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr int kRows = 4;
using FourRows = const float* [kRows];  // each as row_floats() gives it

template <int Distance>
VDCORE_INLINE vf fold(vf a, vf b) {
  exchange<Distance>(a, b);
  return a + b;
}
// Lane r, and every fourth lane after it: the sum of the lanes of x[r].
VDCORE_INLINE vf lane_sums(const vf (&x)[kRows]) {
  vf y = fold<2>(fold<1>(x[0], x[1]), fold<1>(x[2], x[3]));
  if constexpr (W > 4) y = fold<4>(y, y);
  if constexpr (W > 8) y = fold<8>(y, y);
  return y;
}

// Lane r, and every fourth lane after it: the sum over row r of term(r, c), c = 0, W, ... below n, and of rest(r).
template <typename Term, typename Rest>
VDCORE_INLINE vf row_sums(int64_t n, const Term& term, const Rest& rest) {
  constexpr int kChains = 2;  // of additions, for each row
  vf total[kRows][kChains] = {}, sum[kRows];
  int64_t c = 0;
  for (; c + kChains * W <= n; c += kChains * W)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < kChains; ++i) total[r][i] += term(r, c + i * W);
  if (c + W <= n)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) total[r][0] += term(r, c);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = total[r][0] + (total[r][1] + rest(r));
  return lane_sums(sum);
}

// Mean (0 for rms) and 1 / sqrt(mean square distance from it + eps) of each row.
struct Moments {
  float mean[kRows], rstd[kRows];

  VDCORE_INLINE Moments(NormKind kind, float eps, const FourRows& x, int64_t n) {
    const int64_t whole = n / W * W;
    const vi last = iota() < static_cast<int32_t>(n - whole);
    const auto at = [&](int r, int64_t c) __attribute__((always_inline)) { return load(x[r] + c); };
    vf means = {}, shift[kRows] = {};
    if (kind == NormKind::layer) {
      means =
          row_sums(whole, at, [&](int r) __attribute__((always_inline)) { return whole < n ? at(r, whole) : vf{}; }) /
          splat(static_cast<float>(n));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) shift[r] = splat(means[r]);
    }
    const auto square = [&](int r, int64_t c) __attribute__((always_inline)) {
      const vf d = at(r, c) - shift[r];
      return d * d;
    };
    const vf squares = row_sums(whole, square, [&](int r) __attribute__((always_inline)) {
      return whole < n ? select(last, square(r, whole), vf{}) : vf{};
    });
    const vf rstds = 1.f / sqrt(squares / splat(static_cast<float>(n)) + eps);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) mean[r] = means[r], rstd[r] = rstds[r];
  }
};

// Writes value(r, c, shared(c)) to the channels c, c + W, ... of row r, shared(c) being loaded once for all rows. Two
// vectors at a time, as write_values() does; no streaming, which wants one row after another: where rows are whole
// pages apart, four at a time took twice as long.
template <DType T, typename Shared, typename Value>
VDCORE_INLINE void write_rows(char* const (&rows)[kRows], int64_t n, const Shared& shared, const Value& value) {
  using E = Element<T>;
  typename E::type* p[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) p[r] = reinterpret_cast<typename E::type*>(rows[r]);
  int64_t c = 0;
  for (; c + 2 * W <= n; c += 2 * W) {
    const auto low = shared(c), high = shared(c + W);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) E::store(p[r] + c, value(r, c, low), value(r, c + W, high));
  }
  for (; c < n; c += W) {
    const auto all = shared(c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      n - c >= W ? E::store(p[r] + c, value(r, c, all)) : store_partial<T>(p[r] + c, value(r, c, all), n - c);
  }
}

}  // namespace vdcore::cpu::VDCORE_ISA
