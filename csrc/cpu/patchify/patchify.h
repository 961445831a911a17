// Arguments of patch embedding and its inverse on the CPU. Shapes: B batch, C channels, (T, H, W) the video's frames,
// rows and columns, N tokens of a frame, E channels of a token, K = C * pt * ph * pw numbers of a patch.
#pragma once

#include "cpu/core/arguments.h"

namespace vdcore::cpu {

// A video (B, C, grid * patch) with any strides as patches (B, grid, K). Numbers of a patch come in the order
// (c, pt, ph, pw), or (pt, ph, pw, c) with channels_last.
struct Patches {
  TensorView video;
  int64_t patch[3] = {1, 1, 1}, grid[3] = {1, 1, 1};
  bool channels_last = false;
};

// weight(k, e) = data[k * k_stride + e * e_stride].
struct PatchWeight {
  const float* data = nullptr;
  int64_t k_stride = 0, e_stride = 0;
};

// tokens = patches * weight + bias, or the other way round: patches = tokens * weight^T + bias.
struct PatchProduct {
  Patches patches;
  TensorView tokens;  // (B, grid[0], N, E), unit stride last; contiguous where they are the result
  PatchWeight weight;
  const float* bias = nullptr;  // (E,) or (K,), optional
  float* packed = nullptr;      // the weight in panels: room for (E + 64) * (K + 64)
  int threads = 1;
};

// Gradient of the weight: patches^T * tokens, summed over tokens in parts that the caller adds up in order: same bits
// for any number of threads.
struct PatchWeightGradient {
  Patches patches;
  TensorView tokens;
  int64_t parts = 1;
  float* dweight = nullptr;      // (parts, K, E)
  float* sum_tokens = nullptr;   // (parts, E), optional
  float* sum_patches = nullptr;  // (parts, K), optional
  int threads = 1;
};

}  // namespace vdcore::cpu
