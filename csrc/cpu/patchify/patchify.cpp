// Patch embedding, its inverse and their gradients: products whose patch side is gathered from the video, or scattered
// to it, tile by tile. Three kernels serve all: tokens from patches, patches from tokens, and the weight's gradient.
// Products are unrolled for every height of a block, so what follows a sum is compiled about 150 times: rare ends of it
// are functions, and products of float32 tiles are compiled once, not per dtype.
#include "cpu/patchify/patchify.h"

#include "cpu/core/arena.h"
#include "cpu/core/items.h"
#include "cpu/patchify/patches.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kMaxTile = 64 / kBlockRows * kBlockRows;  // tokens
// Products of one chain of additions, whose rounding errors grow with its length: 256 erred by 1.3 of what the
// tolerance rule allows at 264 channels. As many rows of a panel stay in L1.
constexpr int64_t kSumOver = 128;

// As many tokens as keep `floats` numbers of each within a budget.
int64_t tile_of(int64_t floats, int64_t budget) {
  const int64_t n = budget / floats / kBlockRows * kBlockRows;
  return n < kBlockRows ? kBlockRows : smaller(n, kMaxTile);
}

// tokens = patches * weight + bias.
struct TokensFromPatches {
  const PatchProduct& a;
  PatchShape n;
  bool stream;
  bool staged;  // two bytes an element fill half a cache line per panel: whole rows are put together first
  TileRange range;

  explicit TokensFromPatches(const PatchProduct& args)
      : a(args),
        n(args.patches, args.tokens),
        stream(streams(args.tokens)),
        staged(stream && args.tokens.dtype != DType::f32),
        range(n.tokens, staged ? smaller(tile_of(n.K, 4096), tile_of(n.E, 64 * 1024)) : tile_of(n.K, 4096),
              args.threads) {}

  void pack() const { pack_panels(a.weight.data, a.weight.k_stride, a.weight.e_stride, n.K, n.E, a.packed); }

  template <DType T>
  void run(int64_t item) const {
    using Type = typename Element<T>::type;
    Arena count(nullptr);
    tiles(count);
    Arena arena(scratch(count.used()));
    const Tiles t = tiles(arena);
    for (int64_t e = 0; e < n.E; ++e) t.bias[e] = a.bias ? a.bias[e] : 0.f;
    for (int64_t e = n.E; e < panels(n.E) * kPanel; ++e) t.bias[e] = 0;
    range.for_tiles(item, [&](int64_t token, int64_t rows) {
      gather_patches<T>(a.patches, token, rows, t.patches, range.tile);
      auto* out = reinterpret_cast<Type*>(staged ? t.stage : token_row(a.tokens, token));
      for (int64_t e = 0; e < n.E; e += kPanel) {
        const vf bias_left = load(t.bias + e), bias_right = load(t.bias + e + W);
        multiply_panel(rows, n.K, {t.patches, 1, range.tile}, a.packed + e * n.K,
                       [&](int64_t m, vf left, vf right) __attribute__((always_inline)) {
                         Type* at = out + m * n.E + e;
                         write<T>(at, left + bias_left, n.E - e, stream && !staged);
                         write<T>(at + W, right + bias_right, n.E - e - W, stream && !staged);
                       });
      }
      if (staged) copy_out(t.stage, token_row(a.tokens, token), rows * n.E * size_of(T));
    });
  }

 private:
  struct Tiles {
    float *patches, *bias;
    char* stage;
  };
  Tiles tiles(Arena& arena) const {
    return {arena.floats(n.K * range.tile), arena.floats(panels(n.E) * kPanel),
            reinterpret_cast<char*>(arena.floats(staged ? range.tile * n.E / 2 : 0))};
  }
  template <DType T>
  static VDCORE_INLINE void write(typename Element<T>::type* at, vf x, int64_t columns, bool streamed) {
    if (columns < W)
      write_rest<T>(at, x, columns);
    else if (T == DType::f32 && streamed)  // the others are staged
      Element<T>::stream(at, x);
    else
      Element<T>::store(at, x);
  }
  template <DType T>
  static __attribute__((noinline)) void write_rest(typename Element<T>::type* at, vf x, int64_t columns) {
    if (columns > 0) store_partial<T>(at, x, columns);
  }
  // A multiple of W elements of two bytes.
  static void copy_out(const char* in, char* out, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += sizeof(vu16))
      stream_bytes(out + i, *reinterpret_cast<const vu16_unaligned*>(in + i));
  }
};

// patches = tokens * weight^T + bias.
//
// Rows of float32 are multiplied where they lie: to copy 1,152
// channels takes a third of the time of their products with 32 patch values, and while one is copied none is
// multiplied.
struct PatchesFromTokens {
  const PatchProduct& a;
  PatchShape n;
  TileRange range;

  explicit PatchesFromTokens(const PatchProduct& args)
      : a(args), n(args.patches, args.tokens), range(n.tokens, kMaxTile, args.threads) {}

  void pack() const { pack_panels(a.weight.data, a.weight.e_stride, a.weight.k_stride, n.E, n.K, a.packed); }

  template <DType T>
  void run(int64_t item) const {
    const int64_t width = panels(n.K) * kPanel;
    const bool in_place = T == DType::f32 && evenly_apart();
    const int64_t copied_row = round_up(n.E) + W;  // not a power of two apart
    Arena count(nullptr);
    count.floats(kBlockRows * copied_row), count.floats(range.tile * width), count.floats(width);
    Arena arena(scratch(count.used()));
    float *copied = arena.floats(kBlockRows * copied_row), *sums = arena.floats(range.tile * width);
    float* bias = arena.floats(width);
    for (int64_t k = 0; k < width; ++k) bias[k] = a.bias && k < n.K ? a.bias[k] : 0.f;
    range.for_tiles(item, [&](int64_t token, int64_t rows) {
      for (int64_t m = 0; m < rows; ++m) memcpy(sums + m * width, bias, width * sizeof(float));
      for (int64_t first = 0; first < rows; first += kBlockRows) {
        const int64_t height = smaller(kBlockRows, rows - first);
        const Tile out{sums + first * width, width};
        if (in_place) {
          NoPrefetch none;
          const auto* block = reinterpret_cast<const float*>(token_row(a.tokens, token + first));
          add_product(height, {block, a.tokens.stride[2], 1}, out, none);
        } else {
          for (int64_t m = 0; m < height; ++m)
            read_row<T>(token_row(a.tokens, token + first + m), n.E, copied + m * copied_row);
          NextRows next{a.tokens, n.E * size_of(T), token + first + height,
                        smaller(token + first + height + kBlockRows, range.first(item + 1))};
          Prefetch prefetch;
          prefetch.source = NextRows::take;
          prefetch.context = &next;
          prefetch.stride = 64;
          add_product(height, {copied, copied_row, 1}, out, prefetch);
        }
      }
      scatter_patches<T>(a.patches, token, rows, sums, width);
    });
  }

 private:
  // All rows at one distance, which brings no more than four of a block into the same lines of L1.
  bool evenly_apart() const {
    const TensorView& x = a.tokens;
    const bool even = (x.size[1] == 1 || x.stride[1] == x.size[2] * x.stride[2]) &&
                      (x.size[0] == 1 || x.stride[0] == x.size[1] * x.size[2] * x.stride[2]);
    return even && x.stride[2] % 256 != 0;
  }

  // Of the block after this one, to be fetched while this one is multiplied.
  struct NextRows {
    const TensorView& tokens;
    int64_t bytes, token, end;
    static bool take(void* context, const char*& at, int64_t& left) {
      auto& rows = *static_cast<NextRows*>(context);
      if (rows.token >= rows.end) return false;
      at = token_row(rows.tokens, rows.token++);
      left = rows.bytes;
      return true;
    }
  };

  // sums (rows, K) += block (rows, E) * weight^T
  template <typename P>
  void add_product(int64_t rows, Scalars block, Tile sums, P& prefetch) const {
    for (int64_t e = 0; e < n.E; e += kSumOver)
      for (int64_t k = 0; k < n.K; k += kPanel) {
        const Tile weight{a.packed + k * n.E + e * kPanel, kPanel};
        product(rows, smaller(kPanel, round_up(n.K - k)), smaller(kSumOver, n.E - e), block.at(0, e), weight,
                sums.at(0, k), true, prefetch);
      }
  }
};

struct WeightGradient : WeightItems {
  using WeightItems::WeightItems;

  template <DType T>
  void run(int64_t item) const {
    const int64_t part = item / ranges, e0 = item % ranges * width, columns = smaller(width, n.E - e0);
    const int64_t first = n.tokens * part / g.parts, last = n.tokens * (part + 1) / g.parts;
    Arena count(nullptr);
    count.floats(n.K * kMaxTile), count.floats(kMaxTile * width), count.floats(width), count.floats(width);
    Arena arena(scratch(count.used()));
    float *patches = arena.floats(n.K * kMaxTile), *tokens = arena.floats(kMaxTile * width);
    float *line = arena.floats(width), *sum_tile = arena.floats(width);
    float* dweight = g.dweight + part * n.K * n.E + e0;
    float* sum_tokens = g.sum_tokens ? g.sum_tokens + part * n.E + e0 : nullptr;
    float* sum_patches = g.sum_patches && e0 == 0 ? g.sum_patches + part * n.K : nullptr;
    clear(sum_tokens, columns);
    clear(sum_patches, n.K);
    for (int64_t k = 0; k < n.K; ++k) clear(dweight + k * n.E, columns);
    for (int64_t token = first; token < last; token += kMaxTile) {
      const int64_t rows = smaller(kMaxTile, last - token);
      gather_patches<T>(g.patches, token, rows, patches, kMaxTile);
      clear(sum_tile, columns);
      for (int64_t m = 0; m < rows; ++m) {
        const char* row = token_row(g.tokens, token + m) + e0 * size_of(T);
        read_row<T>(row, columns, line);
        for (int64_t c = round_up(columns); c < panels(columns) * kPanel; c += W) store(line + c, vf{});
        for (int64_t c = 0; c < columns; c += kPanel) {
          float* at = tokens + c * kMaxTile + m * kPanel;
          store(at, load(line + c));
          store(at + W, load(line + c + W));
        }
        if (sum_tokens) add(line, columns, sum_tile);
      }
      // A tile's sum first: errors grow with the length of a chain of additions.
      if (sum_tokens) add(sum_tile, columns, sum_tokens);
      for (int64_t k = 0; k < n.K && sum_patches; ++k) {
        float sum = 0;
        for (int64_t m = 0; m < rows; ++m) sum += patches[k * kMaxTile + m];
        sum_patches[k] += sum;
      }
      add_products(patches, tokens, rows, columns, dweight);
    }
  }

 private:
  // dweight (K, columns) += patches (K, rows) * tokens (rows, columns), the latter in panels.
  void add_products(const float* patches, const float* tokens, int64_t rows, int64_t columns, float* dweight) const {
    for (int64_t c = 0; c < columns; c += kPanel)
      multiply_panel(n.K, rows, {patches, kMaxTile, 1}, tokens + c * kMaxTile,
                     [&](int64_t k, vf left, vf right) __attribute__((always_inline)) {
                       float* at = dweight + k * n.E + c;
                       add_up_to(at, left, columns - c);
                       add_up_to(at + W, right, columns - c - W);
                     });
  }
  static void clear(float* x, int64_t count) {
    if (x) memset(x, 0, count * sizeof(float));
  }
  static VDCORE_INLINE void add_up_to(float* at, vf x, int64_t count) {
    if (count >= W)
      store(at, load(at) + x);
    else
      add_rest(at, x, count);
  }
  static __attribute__((noinline)) void add_rest(float* at, vf x, int64_t count) {
    if (count > 0) store_partial<DType::f32>(at, load_partial<DType::f32>(at, count) + x, count);
  }
  static void add(const float* x, int64_t count, float* sum) {
    for (int64_t c = 0; c < count; c += W) add_up_to(sum + c, load(x + c), count - c);
  }
};

}  // namespace

void tokens_from_patches(const PatchProduct& a) {
  const TokensFromPatches kernel(a);
  kernel.pack();
  run_items(kernel, a.tokens.dtype, kernel.range.items(), a.threads);
}
void patches_from_tokens(const PatchProduct& a) {
  const PatchesFromTokens kernel(a);
  kernel.pack();
  run_items(kernel, a.tokens.dtype, kernel.range.items(), a.threads);
}
void patch_weight_gradient(const PatchWeightGradient& g) {
  const WeightGradient kernel(g);
  run_items(kernel, g.tokens.dtype, kernel.items(), g.threads);
}

}  // namespace vdcore::cpu::VDCORE_ISA
