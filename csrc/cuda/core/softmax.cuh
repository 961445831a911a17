// Softmax of scores in registers, as products leave them (rows.cuh): a lane has columns 2 c and 2 c + 1 of every tile
// of eight, of row r in [0] and [1] and of row r + 8 in [2] and [3]. Exponents are of base 2.
#pragma once

#include "cuda/core/rows.cuh"

namespace vdcore::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// Scores of row half h become 2^(factor * score - base), 0 where visible(n, h, e) does not hold; returns base.
// `highest`: the largest scaled score of the row so far, -infinity before the first.
template <int N, typename Visible>
VDCORE_DEVICE float exponentials(float (&s)[N][4], int h, float factor, float& highest, Visible visible) {
  unroll<N, 2>([&](int n, int e) {
    float& x = s[n][2 * h + e];
    x = visible(n, h, e) ? x * factor : -infinity();
    highest = maximum(highest, x);
  });
  highest = row_maximum(highest);
  const float base = highest == -infinity() ? 0 : highest;
  unroll<N, 2>([&](int n, int e) { s[n][2 * h + e] = exp2_approx(s[n][2 * h + e] - base); });
  return base;
}

// total + the lane's columns of row half h.
template <int N>
VDCORE_DEVICE float add_columns(float total, const float (&s)[N][4], int h) {
  unroll<N, 2>([&](int n, int e) { total += s[n][2 * h + e]; });
  return total;
}

// What a row's sums are divided by; a row that sees nothing stays 0.
VDCORE_DEVICE float inverse(float total) { return total == 0 ? 0 : reciprocal(total); }

// The natural logarithm of a row's sum of exponentials.
VDCORE_DEVICE float log_sum(float highest, float total) {
  return ((highest == -infinity() ? 0 : highest) + log2_approx(total)) * (1 / kLog2E);
}

}  // namespace vdcore::cuda
