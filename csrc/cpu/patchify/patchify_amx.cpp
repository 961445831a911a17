// Patch embedding, its inverse and their gradients, of bfloat16 in AMX's tiles; other dtypes, and weights that are no
// bfloat16, as without them.
#include "cpu/core/arena.h"
#include "cpu/core/items.h"
#include "cpu/core/pairs.h"
#include "cpu/patchify/patches.h"

namespace vdcore::cpu::VDCORE_REST {
void tokens_from_patches(const PatchProduct&);
void patches_from_tokens(const PatchProduct&);
void patch_weight_gradient(const PatchWeightGradient&);
}  // namespace vdcore::cpu::VDCORE_REST

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kTokens = 2 * kTileRows;  // of a tile
constexpr int64_t kColumns = 2 * kTileRows;

VDCORE_INLINE int64_t whole_columns(int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

template <typename Kernel>
void run_in_tiles(const Kernel& kernel, int64_t items, int threads) {
  parallel_for(
      items, threads,
      [](void* p, int64_t item) {
        TileScope registers;
        static_cast<const Kernel*>(p)->run(item);
        stream_fence();
      },
      const_cast<Kernel*>(&kernel));
}

// B(r, c) = in[r * row + c * column] as the right operand, its columns whole; false where a number is no bfloat16.
bool pack_weight(const float* in, int64_t row, int64_t column, int64_t rows, int64_t columns, Pairs out) {
  memset(out.data, 0, least_terms(rows) / 2 * out.row * sizeof(uint16_t));
  uint32_t lost = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      uint32_t bits;
      memcpy(&bits, in + r * row + c * column, sizeof bits);
      lost |= bits;
      out.at(r, c).data[r % 2] = static_cast<uint16_t>(bits >> 16);
    }
  return (lost & 0xFFFFu) == 0;
}

// Tokens [token, token + count) as rows of `columns` channels from `first` on; 0 past the last, and in rows up to
// `rows`.
void stage_tokens(const TensorView& tokens, int64_t token, int64_t count, int64_t first, int64_t columns, int64_t rows,
                  Rows out) {
  for (int64_t m = 0; m < count; ++m) {
    uint16_t* to = out.at(m, 0).data;
    memcpy(to, token_row(tokens, token + m) + first * sizeof(uint16_t), columns * sizeof(uint16_t));
    memset(to + columns, 0, (out.row - columns) * sizeof(uint16_t));
  }
  memset(out.at(count, 0).data, 0, (rows - count) * out.row * sizeof(uint16_t));
}

// tokens = patches * weight + bias.
struct TokensFromPatches {
  const PatchProduct& a;
  PatchShape n;
  int64_t terms, width;
  Pairs weight;
  bool stream;
  TileRange range;

  explicit TokensFromPatches(const PatchProduct& args)
      : a(args),
        n(args.patches, args.tokens),
        terms(least_terms(n.K)),
        width(whole_columns(n.E)),
        weight{reinterpret_cast<uint16_t*>(args.packed), 2 * width},
        stream(streams(args.tokens)),
        range(n.tokens, kTokens, args.threads) {}

  bool pack() const { return pack_weight(a.weight.data, a.weight.k_stride, a.weight.e_stride, n.K, n.E, weight); }

  void run(int64_t item) const {
    Arena count(nullptr);
    Tiles(*this, count);
    Arena arena(scratch(count.used()));
    const Tiles t(*this, arena);
    for (int64_t e = 0; e < width; ++e) t.bias[e] = a.bias && e < n.E ? a.bias[e] : 0.f;
    range.for_tiles(item, [&](int64_t token, int64_t rows) {
      gather(token, rows, t.patches);
      auto* to = reinterpret_cast<uint16_t*>(token_row(a.tokens, token));
      uint16_t* out = stream ? t.stage : to;
      for (int64_t e = 0; e < n.E; e += kColumns) {
        product(kTokens, kColumns, terms, t.patches, weight.at(0, e), t.sums, false);
        const vf left = load(t.bias + e), right = load(t.bias + e + W);
        for (int64_t m = 0; m < rows; ++m) {
          const float* sum = t.sums.at(m, 0).data;
          write(out + m * n.E + e, load(sum) + left, load(sum + W) + right, n.E - e);
        }
      }
      for (int64_t i = 0; stream && i < rows * n.E; i += W)
        stream_bytes(to + i, *reinterpret_cast<const vu16_unaligned*>(out + i));
    });
  }

 private:
  struct Tiles {
    Rows patches;  // (kTokens, terms)
    float* bias;
    Tile sums;  // (kTokens, kColumns)
    uint16_t* stage;

    Tiles(const TokensFromPatches& of, Arena& arena) {
      patches = {reinterpret_cast<uint16_t*>(arena.floats(kTokens * of.terms / 2)), of.terms};
      bias = arena.floats(of.width);
      sums = {arena.floats(kTokens * kColumns), kColumns};
      stage = reinterpret_cast<uint16_t*>(arena.floats(of.stream ? kTokens * of.n.E / 2 : 0));
    }
  };

  void gather(int64_t token, int64_t rows, Rows out) const {
    memset(out.data, 0, kTokens * out.row * sizeof(uint16_t));
    for_patch_runs<const uint16_t>(a.patches, token, rows,
                                   [&](const uint16_t* at, int64_t first, int64_t count, int64_t stride, int64_t k) {
                                     uint16_t* to = out.at(first, k).data;
                                     for (int64_t i = 0; i < count; ++i) to[i * out.row] = at[i * stride];
                                   });
  }
  static VDCORE_INLINE void write(uint16_t* at, vf left, vf right, int64_t columns) {
    if (columns >= kColumns) return Element<DType::bf16>::store(at, left, right);
    store_partial<DType::bf16>(at, left, smaller(columns, W));
    if (columns > W) store_partial<DType::bf16>(at + W, right, columns - W);
  }
};

// patches = tokens * weight^T + bias.
struct PatchesFromTokens {
  const PatchProduct& a;
  PatchShape n;
  int64_t terms, width;
  Pairs weight;
  TileRange range;

  explicit PatchesFromTokens(const PatchProduct& args)
      : a(args),
        n(args.patches, args.tokens),
        terms(least_terms(n.E)),
        width(whole_rows(n.K)),
        weight{reinterpret_cast<uint16_t*>(args.packed), 2 * width},
        range(n.tokens, kTokens, args.threads) {}

  bool pack() const { return pack_weight(a.weight.data, a.weight.e_stride, a.weight.k_stride, n.E, n.K, weight); }

  void run(int64_t item) const {
    Arena count(nullptr);
    Tiles(*this, count);
    Arena arena(scratch(count.used()));
    const Tiles t(*this, arena);
    for (int64_t k = 0; k < width; ++k) t.bias[k] = a.bias && k < n.K ? a.bias[k] : 0.f;
    range.for_tiles(item, [&](int64_t token, int64_t rows) {
      stage_tokens(a.tokens, token, rows, 0, n.E, kTokens, t.tokens);
      product(kTokens, width, terms, t.tokens, weight, t.sums, false);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t k = 0; k < width; k += W) {
          float* at = t.sums.at(m, k).data;
          store(at, load(at) + load(t.bias + k));
        }
      scatter_patches<DType::bf16>(a.patches, token, rows, t.sums.data, t.sums.row);
    });
  }

 private:
  struct Tiles {
    Rows tokens;  // (kTokens, terms)
    float* bias;
    Tile sums;  // (kTokens, width)

    Tiles(const PatchesFromTokens& of, Arena& arena) {
      tokens = {reinterpret_cast<uint16_t*>(arena.floats(kTokens * of.terms / 2)), of.terms};
      bias = arena.floats(of.width);
      sums = {arena.floats(kTokens * of.width), of.width};
    }
  };
};

struct WeightGradient : WeightItems {
  static constexpr int64_t kTokens = 2 * kTileTerms;  // of a tile

  using WeightItems::WeightItems;

  void run(int64_t item) const {
    const int64_t part = item / ranges, e0 = item % ranges * width, columns = smaller(width, n.E - e0);
    const int64_t first = n.tokens * part / g.parts, last = n.tokens * (part + 1) / g.parts;
    Arena count(nullptr);
    Tiles(*this, count);
    Arena arena(scratch(count.used()));
    const Tiles t(*this, arena);
    float* sum_patches = g.sum_patches && e0 == 0 ? g.sum_patches + part * n.K : nullptr;
    for (int64_t k = 0; k < n.K && sum_patches; ++k) sum_patches[k] = 0;
    memset(t.sum, 0, width * sizeof(float));
    memset(t.dweight.data, 0, whole_rows(n.K) * width * sizeof(float));
    for (int64_t token = first; token < last; token += kTokens) {
      const int64_t rows = smaller(kTokens, last - token);
      gather(token, rows, t.patches);
      stage_tokens(g.tokens, token, rows, e0, columns, kTokens, t.stage);
      pack_pairs(kTokens, whole_rows(columns), t.stage, t.tokens);
      product(whole_rows(n.K), whole_rows(columns), kTokens, t.patches, t.tokens, t.dweight, true);
      if (g.sum_tokens) add_rows(t.stage, rows, columns, t.sum);
      for (int64_t k = 0; k < n.K && sum_patches; ++k) sum_patches[k] += row_total(t.patches.at(k, 0).data);
    }
    for (int64_t k = 0; k < n.K; ++k)
      memcpy(g.dweight + (part * n.K + k) * n.E + e0, t.dweight.at(k, 0).data, columns * sizeof(float));
    if (g.sum_tokens) memcpy(g.sum_tokens + part * n.E + e0, t.sum, columns * sizeof(float));
  }

 private:
  struct Tiles {
    Rows patches;  // (K, kTokens)
    Rows stage;    // (kTokens, width)
    Pairs tokens;  // the same
    Tile dweight;  // (K, width)
    float* sum;    // (width,)

    Tiles(const WeightGradient& of, Arena& arena) {
      patches = {reinterpret_cast<uint16_t*>(arena.floats(whole_rows(of.n.K) * kTokens / 2)), kTokens};
      stage = {reinterpret_cast<uint16_t*>(arena.floats(kTokens * of.width / 2)), of.width};
      tokens = {reinterpret_cast<uint16_t*>(arena.floats(kTokens * of.width / 2)), 2 * of.width};
      dweight = {arena.floats(whole_rows(of.n.K) * of.width), of.width};
      sum = arena.floats(of.width);
    }
  };

  // patches[k][i] = number k of patch token + i; 0 past the last token.
  void gather(int64_t token, int64_t rows, Rows out) const {
    memset(out.data, 0, whole_rows(n.K) * out.row * sizeof(uint16_t));
    for_patch_runs<const uint16_t>(g.patches, token, rows,
                                   [&](const uint16_t* at, int64_t first, int64_t count, int64_t stride, int64_t k) {
                                     copy_strided(at, stride, count, out.at(k, first).data);
                                   });
  }

  // A tile's sum first: errors grow with the length of a chain of additions.
  static void add_rows(Rows rows, int64_t count, int64_t columns, float* sum) {
    for (int64_t c = 0; c < columns; c += W) {
      vf total = {};
      for (int64_t m = 0; m < count; ++m) total += from_bf16(*reinterpret_cast<vu16_unaligned*>(rows.at(m, c).data));
      store(sum + c, load(sum + c) + total);
    }
  }
  static float row_total(const uint16_t* row) {
    vf total = {};
    for (int64_t i = 0; i < kTokens; i += W) total += from_bf16(*reinterpret_cast<const vu16_unaligned*>(row + i));
    return sum(total);
  }
};

}  // namespace

void tokens_from_patches(const PatchProduct& a) {
  const TokensFromPatches kernel(a);
  if (a.tokens.dtype != DType::bf16 || !kernel.pack()) return VDCORE_REST::tokens_from_patches(a);
  run_in_tiles(kernel, kernel.range.items(), a.threads);
}
void patches_from_tokens(const PatchProduct& a) {
  const PatchesFromTokens kernel(a);
  if (a.tokens.dtype != DType::bf16 || !kernel.pack()) return VDCORE_REST::patches_from_tokens(a);
  run_in_tiles(kernel, kernel.range.items(), a.threads);
}
void patch_weight_gradient(const PatchWeightGradient& g) {
  if (g.tokens.dtype != DType::bf16) return VDCORE_REST::patch_weight_gradient(g);
  const WeightGradient kernel(g);
  run_in_tiles(kernel, kernel.items(), g.threads);
}

}  // namespace vdcore::cpu::VDCORE_ISA
