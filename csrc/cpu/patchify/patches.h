// Patches of a video, gathered into tiles and scattered from them.
#pragma once

#include "cpu/core/gemm.h"
#include "cpu/patchify/patchify.h"

namespace vdcore::cpu::VDCORE_ISA {

struct PatchShape {
  int64_t N, E, K, tokens;

  PatchShape(const Patches& p, const TensorView& x)
      : N(x.size[2]),
        E(x.size[3]),
        K(p.video.size[1] * p.patch[0] * p.patch[1] * p.patch[2]),
        tokens(x.size[0] * x.size[1] * x.size[2]) {}
};

// Tokens cut into tiles, and tiles into about eight items per thread.
struct TileRange {
  int64_t tokens, tile, tiles_of_item;

  TileRange(int64_t all, int64_t of_tile, int threads) : tokens(all), tile(of_tile) {
    tiles_of_item = larger(1, tiles() / (8 * threads));
  }
  int64_t tiles() const { return (tokens + tile - 1) / tile; }
  int64_t items() const { return (tiles() + tiles_of_item - 1) / tiles_of_item; }

  int64_t first(int64_t item) const { return smaller(tokens, item * tiles_of_item * tile); }

  template <typename Body>
  void for_tiles(int64_t item, const Body& body) const {
    const int64_t last = first(item + 1);
    for (int64_t token = first(item); token < last; token += tile) body(token, smaller(tile, last - token));
  }
};

// The gradient of the weight: an item is one part of the tokens and one range of their channels.
struct WeightItems {
  const PatchWeightGradient& g;
  PatchShape n;
  int64_t width, ranges;  // channels of a range

  explicit WeightItems(const PatchWeightGradient& args) : g(args), n(args.patches, args.tokens) {
    width = 1024;
    while (width > 128 && g.parts * ((n.E + width - 1) / width) < 4 * g.threads) width /= 2;
    ranges = (n.E + width - 1) / width;
  }
  int64_t items() const { return g.parts * ranges; }
};

inline char* token_row(const TensorView& tokens, int64_t token) {
  const int64_t T = tokens.size[1], N = tokens.size[2];
  return tokens.at(token / N / T, token / N % T, token % N);
}

// Calls body(at, first, count, stride, k) for every k and every run of tokens along a row of the grid: number k of
// token first + i of the tile is at[i * stride], in elements.
template <typename Type, typename Body>
VDCORE_INLINE void for_patch_runs(const Patches& p, int64_t token, int64_t count, const Body& body) {
  const TensorView& v = p.video;
  const int64_t C = v.size[1], columns = p.grid[2], rows = p.grid[1], step = p.patch[2] * v.stride[4];
  for (int64_t first = 0; first < count;) {
    const int64_t at = token + first, x = at % columns, y = at / columns % rows, frame = at / columns / rows;
    const int64_t t = frame % p.grid[0], b = frame / p.grid[0], run = smaller(columns - x, count - first);
    auto* corner = reinterpret_cast<Type*>(v.at(b, 0, t * p.patch[0], y * p.patch[1], x * p.patch[2]));
    int64_t place = 0;  // among the numbers of one channel
    for (int64_t dt = 0; dt < p.patch[0]; ++dt)
      for (int64_t dy = 0; dy < p.patch[1]; ++dy)
        for (int64_t dx = 0; dx < p.patch[2]; ++dx, ++place)
          for (int64_t c = 0; c < C; ++c) {
            const int64_t k = p.channels_last ? place * C + c : c * p.patch[0] * p.patch[1] * p.patch[2] + place;
            body(corner + c * v.stride[1] + dt * v.stride[2] + dy * v.stride[3] + dx * v.stride[4], first, run, step,
                 k);
          }
    first += run;
  }
}

template <typename Type>
VDCORE_INLINE void copy_strided(const Type* in, int64_t stride, int64_t n, Type* out) {
  if (stride == 1)
    memcpy(out, in, n * sizeof(Type));
  else if (stride == 2)
    for (int64_t i = 0; i < n; ++i) out[i] = in[2 * i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = in[i * stride];
}

// out[k][i] = number k of patch token + i, rows of `row` floats; for count <= 64.
template <DType T>
void gather_patches(const Patches& p, int64_t token, int64_t count, float* out, int64_t row) {
  using Type = typename Element<T>::type;
  for_patch_runs<const Type>(p, token, count, [&](const Type* at, int64_t first, int64_t n, int64_t stride, int64_t k) {
    float* to = out + k * row + first;
    if constexpr (T == DType::f32) {
      copy_strided(at, stride, n, to);
    } else {
      Type line[64];
      copy_strided(at, stride, n, line);
      int64_t i = 0;
      for (; i + W <= n; i += W) store(to + i, Element<T>::load(line + i));
      for (; i < n; ++i) {
        float lanes[W];
        store(lanes, load_partial<T>(line + i, 1));
        to[i] = lanes[0];
      }
    }
  });
}

// Number k of patch token + i = in[i][k], rows of `row` floats.
template <DType T>
void scatter_patches(const Patches& p, int64_t token, int64_t count, const float* in, int64_t row) {
  using Type = typename Element<T>::type;
  for_patch_runs<Type>(p, token, count, [&](Type* at, int64_t first, int64_t n, int64_t stride, int64_t k) {
    for (int64_t i = 0; i < n; i += W) {
      float lanes[W] = {};
      Type rounded[W];
      const int64_t some = smaller(W, n - i);
      for (int64_t j = 0; j < some; ++j) lanes[j] = in[(first + i + j) * row + k];
      Element<T>::store(rounded, load(lanes));
      for (int64_t j = 0; j < some; ++j) at[(i + j) * stride] = rounded[j];
    }
  });
}

}  // namespace vdcore::cpu::VDCORE_ISA
