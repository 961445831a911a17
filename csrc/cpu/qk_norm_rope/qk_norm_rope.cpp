// QK-norm and rope of q and k, forward and backward: one pass over memory, all heads of a token at a time.
#include "cpu/qk_norm_rope/qk_norm_rope.h"

#include <initializer_list>

#include "cpu/core/arena.h"
#include "cpu/core/head_rows.h"
#include "cpu/core/items.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kTokensOfOneSum = 32;  // then on to the item's sum: shorter chains of additions

// q or k, with what belongs to it.
struct Side {
  const TensorView &x, &y, &dx;  // y: the result, or its gradient
  const float *weight, *bias;
  float *dweight, *dbias;
  bool stream;  // what is written

  int64_t heads() const { return x.size[3]; }
};

struct Tiles {
  HeadRows x, dy;
  float *turned, *mean, *rstd, *sum, *sum_x, *table_row;
  Angles angles, angle_sums;
  float *weight[2], *bias[2];    // padded rows, of each side; null where there is none
  float *dweight[2], *dbias[2];  // likewise

  Tiles(const QKNormRope& a, const Side (&sides)[2], Arena& arena) {
    const int64_t D = a.q.size[4], row = head_row(D), heads = larger(a.q.size[3], a.k.size[3]);
    const int64_t pairs = a.rope.style == RopeStyle::none ? 0 : a.rope.cos.size[3];
    for (HeadRows* rows : {&x, &dy}) *rows = {arena.floats(heads * row), row};
    turned = arena.floats(row);
    for (float** p : {&mean, &rstd, &sum, &sum_x}) *p = arena.floats(round_up(heads));
    table_row = arena.floats(round_up(pairs));
    for (Angles* p : {&angles, &angle_sums})
      *p = {arena.floats(2 * round_up(pairs)), arena.floats(2 * round_up(pairs)), pairs, a.rope.style};
    for (int i = 0; i < 2; ++i) {
      const int64_t n = (a.norm.over_all ? sides[i].heads() : 1) * row;
      weight[i] = sides[i].weight ? arena.floats(n) : nullptr;
      bias[i] = sides[i].bias ? arena.floats(n) : nullptr;
      dweight[i] = sides[i].dweight ? arena.floats(n) : nullptr;
      dbias[i] = sides[i].dbias ? arena.floats(n) : nullptr;
    }
  }
};

struct Tokens {
  int64_t b, t, s, count;  // neighbours along S
};

class Item {
 public:
  Item(const QKNormRope& args, const Side (&both)[2], const TensorView& table_cos, const TensorView& table_sin,
       Arena& arena)
      : a(args), sides(both), dcos(table_cos), dsin(table_sin), t(args, both, arena), D(args.q.size[4]) {
    for (int i = 0; i < 2; ++i) {
      pad(sides[i].weight, sides[i].heads(), t.weight[i]);
      pad(sides[i].bias, sides[i].heads(), t.bias[i]);
      clear_sums(i);
    }
  }

  template <DType T>
  void forward(const Tokens& tokens) {
    for (int64_t s = tokens.s; s < tokens.s + tokens.count; ++s)
      for (int i = 0; i < 2; ++i) forward_token<T>(i, tokens.b, tokens.t, s);
  }

  template <DType T>
  void backward(const Tokens& tokens, int64_t item, int64_t table_offset) {
    for (int64_t s = tokens.s; s < tokens.s + tokens.count; ++s) {
      for (int i = 0; i < 2; ++i)
        if (sides[i].y) backward_token<T>(i, tokens.b, tokens.t, s, table_offset);
      if (++tokens_summed == kTokensOfOneSum) flush(item);
    }
  }

  // Adds this item's sums since the last time to its row.
  void flush(int64_t item) {
    tokens_summed = 0;
    for (int i = 0; i < 2; ++i) {
      add_unpadded(t.dweight[i], sides[i].heads(), sides[i].dweight, item);
      add_unpadded(t.dbias[i], sides[i].heads(), sides[i].dbias, item);
      clear_sums(i);
    }
  }

 private:
  const QKNormRope& a;
  const Side (&sides)[2];
  const TensorView &dcos, &dsin;
  const Tiles t;
  const int64_t D;
  int64_t tokens_summed = 0;
  const char *cos_of = nullptr, *sin_of = nullptr;  // table rows that t.angles holds

  int64_t rows_of_weight(int64_t heads) const { return a.norm.over_all ? heads : 1; }
  int64_t weight_offset(int64_t h) const { return a.norm.over_all ? h * head_row(D) : 0; }

  void pad(const float* weight, int64_t heads, float* out) const {
    if (!weight) return;
    for (int64_t h = 0; h < rows_of_weight(heads); ++h)
      read_row<DType::f32>(reinterpret_cast<const char*>(weight + h * D), D, out + h * head_row(D));
  }
  void clear_sums(int side) const {
    const int64_t n = rows_of_weight(sides[side].heads()) * head_row(D);
    if (t.dweight[side]) memset(t.dweight[side], 0, n * sizeof(float));
    if (t.dbias[side]) memset(t.dbias[side], 0, n * sizeof(float));
  }
  void add_unpadded(const float* sums, int64_t heads, float* out, int64_t item) const {
    if (!sums) return;
    out += item * rows_of_weight(heads) * D;
    for (int64_t h = 0; h < rows_of_weight(heads); ++h)
      for (int64_t c = 0; c < D; ++c) out[h * D + c] += sums[h * head_row(D) + c];
  }

  void read_angles(int64_t frame, int64_t s, int64_t h) {
    const char *cos = a.rope.cos.at(a.frame_start + frame, s, h), *sin = a.rope.sin.at(a.frame_start + frame, s, h);
    if (cos == cos_of && sin == sin_of) return;
    cos_of = cos;
    sin_of = sin;
    with_dtype(a.rope.cos.dtype, [&](auto type) { t.angles.read<decltype(type)::value>(cos, sin, t.table_row); });
  }

  template <DType T>
  void write(const Side& side, char* out, const float* row) const {
    if (side.stream)
      stream_row<T>(out, D, row, 1.f);
    else
      write_row<T>(out, D, row, 1.f);
  }

  // The vector of a head's row at channel c, normed.
  struct Normed {
    const float *x, *weight, *bias;
    vf mean, rstd;
    bool norm;

    VDCORE_INLINE vf operator()(int64_t c) const {
      vf y = load(x + c);
      if (!norm) return y;
      y = (y - mean) * rstd;
      if (weight) y *= load(weight + c);
      if (bias) y += load(bias + c);
      return y;
    }
  };

  // Norm, rotation and the way out in one pass: partners are in one vector, or whole vectors apart.
  template <DType T, bool Stream>
  void finish_head(const Normed& normed, char* out) const {
    using Value = typename Element<T>::type;
    Value* row = reinterpret_cast<Value*>(out);
    const auto emit = [&](int64_t c, vf y) __attribute__((always_inline)) {
      if constexpr (Stream) return Element<T>::stream(row + c, y);
      if (c + W <= D) return Element<T>::store(row + c, y);
      store_partial<T>(row + c, y, D - c);
    };
    const Angles& angles = t.angles;
    const int64_t rotated = 2 * angles.pairs, half = angles.pairs;
    const bool neighbors = rotated && angles.style == RopeStyle::interleaved;
    // Channels that are not rotated stay as they are: nothing of a neighbor that is no number comes into them.
    for (int64_t c = 0; neighbors && c < rotated; c += W) {
      const vf y = normed(c), z = y * load(angles.cos + c) + swap_pairs(y) * load(angles.sin + c);
      emit(c, c + W <= rotated ? z : select(iota() < static_cast<int32_t>(rotated - c), z, y));
    }
    for (int64_t c = 0; !neighbors && c < half; c += W) {
      const vf y = normed(c), z = normed(c + half), cosine = load(angles.cos + c), sine = load(angles.sin + c);
      emit(c, y * cosine - z * sine);
      emit(c + half, z * cosine + y * sine);
    }
    for (int64_t c = round_up(rotated); c < D; c += W) emit(c, normed(c));
  }

  // Where a half of the rotated channels is no whole number of vectors.
  template <DType T>
  void finish_uneven_head(const Side& side, const Normed& normed, float* x, char* out) const {
    for (int64_t c = 0; c < D; c += W) store(x + c, normed(c));
    rotate_head<false>(x, D, t.angles, t.turned);
    write<T>(side, out, t.turned);
  }

  template <DType T>
  void forward_token(int i, int64_t b, int64_t frame, int64_t s) {
    const Side& side = sides[i];
    const bool norm = a.norm.kind != NormKind::none;
    const bool uneven = t.angles.style == RopeStyle::half && t.angles.pairs % W != 0;
    read_heads<T>(side.x.at(b, frame, s), side.x.stride[3], side.heads(), D, t.x);
    if (norm) head_moments(a.norm, t.x, side.heads(), D, t.mean, t.rstd);
    const bool rope = t.angles.pairs > 0, per_head = rope && a.rope.cos.stride[2] != 0;
    if (rope && !per_head) read_angles(frame, s, 0);
    char* out = side.y.at(b, frame, s);
    const int64_t head_bytes = side.y.stride[3] * size_of(T);
    for (int64_t h = 0; h < side.heads(); ++h, out += head_bytes) {
      const int64_t w = weight_offset(h);
      Normed normed = {t.x[h], t.weight[i] ? t.weight[i] + w : nullptr, t.bias[i] ? t.bias[i] + w : nullptr, {}, {},
                       norm};
      if (norm) normed.mean = splat(t.mean[h]), normed.rstd = splat(t.rstd[h]);
      if (per_head) read_angles(frame, s, h);
      if (uneven)
        finish_uneven_head<T>(side, normed, t.x[h], out);
      else if (side.stream)
        finish_head<T, true>(normed, out);
      else
        finish_head<T, false>(normed, out);
    }
  }

  template <DType T>
  void backward_token(int i, int64_t b, int64_t frame, int64_t s, int64_t table_offset) {
    const Side& side = sides[i];
    const int64_t heads = side.heads();
    const bool norm = a.norm.kind != NormKind::none;
    read_heads<T>(side.y.at(b, frame, s), side.y.stride[3], heads, D, t.dy);
    if (norm || dcos) read_heads<T>(side.x.at(b, frame, s), side.x.stride[3], heads, D, t.x);
    if (norm) head_moments(a.norm, t.x, heads, D, t.mean, t.rstd);
    if (t.angles.pairs) rotate_back(i, frame, s, table_offset);
    if (norm) norm_gradient(i);
    for (int64_t h = 0; h < heads; ++h) write<T>(side, side.dx.at(b, frame, s, h), t.dy[h]);
  }

  void rotate_back(int i, int64_t frame, int64_t s, int64_t table_offset) {
    const Side& side = sides[i];
    const bool per_head = dcos && dcos.size[2] > 1;
    const auto add = [&](int64_t h) {
      float* at = reinterpret_cast<float*>(dcos.at(a.frame_start + frame, s, h)) + table_offset;
      add_to_table(t.angle_sums, at, reinterpret_cast<float*>(dsin.at(a.frame_start + frame, s, h)) + table_offset);
    };
    for (int64_t h = 0; h < side.heads(); ++h) {
      read_angles(frame, s, h);
      float* dy = t.dy[h];
      if (dcos) {
        const int64_t w = weight_offset(h), bytes = 2 * round_up(t.angles.pairs) * sizeof(float);
        if (h == 0 || per_head) memset(t.angle_sums.cos, 0, bytes), memset(t.angle_sums.sin, 0, bytes);
        memcpy(t.turned, t.x[h], head_row(D) * sizeof(float));
        if (a.norm.kind != NormKind::none)
          normalize_head(t.turned, D, t.mean[h], t.rstd[h], t.weight[i] ? t.weight[i] + w : nullptr,
                         t.bias[i] ? t.bias[i] + w : nullptr);
        add_angle_gradient(t.turned, dy, t.angle_sums);
        if (per_head) add(h);
      }
      rotate_head<true>(dy, D, t.angles, t.turned);
      for (int64_t c = 0; c < D; c += W) store(dy + c, load(t.turned + c));
    }
    if (dcos && !per_head) add(0);
  }

  // t.dy becomes the gradient of t.x.
  void norm_gradient(int i) {
    const int64_t heads = sides[i].heads();
    const float* weight = t.weight[i];
    float *dweight = t.dweight[i], *dbias = t.dbias[i];
    // In place: dy times weight; x becomes normed, without weight.
    for (int64_t h = 0; h < heads; ++h) {
      float *x = t.x[h], *dy = t.dy[h];
      const int64_t w = weight_offset(h);
      const vf mean = splat(t.mean[h]), rstd = splat(t.rstd[h]);
      for (int64_t c = 0; c < D; c += W) {
        const vf hat = (load(x + c) - mean) * rstd;
        vf d = load(dy + c);
        store(x + c, hat);
        if (dweight) store(dweight + w + c, load(dweight + w + c) + d * hat);
        if (dbias) store(dbias + w + c, load(dbias + w + c) + d);
        if (weight) store(dy + c, d * load(weight + w + c));
      }
    }
    const bool layer = a.norm.kind == NormKind::layer;
    if (layer)
      sum_lanes(heads, t.sum, [&](int64_t h) __attribute__((always_inline)) {
        vf total = {};
        for (int64_t c = 0; c < D; c += W) total += load(t.dy[h] + c);
        return total;
      });
    sum_lanes(heads, t.sum_x, [&](int64_t h) __attribute__((always_inline)) {
      vf total = {};
      for (int64_t c = 0; c < D; c += W) total += load(t.dy[h] + c) * load(t.x[h] + c);
      return total;
    });
    if (a.norm.over_all) {
      if (layer) share_sum(heads, t.sum);
      share_sum(heads, t.sum_x);
    }
    const float n = static_cast<float>(a.norm.over_all ? heads * D : D);
    for (int64_t h = 0; h < heads; ++h) {
      float* dy = t.dy[h];
      const vf mean = splat(layer ? t.sum[h] / n : 0.f), slope = splat(t.sum_x[h] / n), rstd = splat(t.rstd[h]);
      for (int64_t c = 0; c < D; c += W) store(dy + c, (load(dy + c) - mean - load(t.x[h] + c) * slope) * rstd);
    }
  }
};

struct Work {
  const QKNormRope& a;
  const QKNormRopeBackward* g;  // null: forward
  Side sides[2];
  TensorView dcos, dsin;
  int64_t items;
  bool per_position;  // an item owns whole positions, all samples and frames: their rope table rows get one writer

  explicit Work(const QKNormRope& args)
      : a(args),
        g(nullptr),
        sides{{a.q, a.q_out, a.q_out, a.norm.q_weight, a.norm.q_bias, nullptr, nullptr, streams(a.q_out)},
              {a.k, a.k_out, a.k_out, a.norm.k_weight, a.norm.k_bias, nullptr, nullptr, streams(a.k_out)}},
        items(smaller(units(), larger(64, 8 * a.threads))),
        per_position(false) {}

  explicit Work(const QKNormRopeBackward& args)
      : a(args.forward),
        g(&args),
        sides{{a.q, g->dq_out, g->dq, a.norm.q_weight, a.norm.q_bias, g->dq_weight, g->dq_bias, streams(g->dq)},
              {a.k, g->dk_out, g->dk, a.norm.k_weight, a.norm.k_bias, g->dk_weight, g->dk_bias, streams(g->dk)}},
        dcos(g->dcos),
        dsin(g->dsin),
        items(g->items),
        per_position(g->dcos && g->dcos.size[1] > 1) {}

  int64_t units() const { return a.q.size[0] * a.q.size[1] * a.q.size[2]; }

  // Calls body with the tokens of an item, run by run along S.
  template <typename Body>
  void for_tokens(int64_t item, const Body& body) const {
    const int64_t T = a.q.size[1], S = a.q.size[2];
    const int64_t all = per_position ? S : units();
    const int64_t per_item = (all + items - 1) / items, first = item * per_item, last = smaller(all, first + per_item);
    if (first >= last) return;
    if (per_position) {
      for (int64_t b = 0; b < a.q.size[0]; ++b)
        for (int64_t t = 0; t < T; ++t) body(Tokens{b, t, first, last - first});
      return;
    }
    for (int64_t at = first; at < last;) {
      const int64_t s = at % S, count = smaller(S - s, last - at);
      body(Tokens{at / S / T, at / S % T, s, count});
      at += count;
    }
  }

  template <DType T>
  void run(int64_t index) const {
    Arena count(nullptr);
    Tiles(a, sides, count);
    Arena arena(scratch(count.used()));
    Item item(a, sides, dcos, dsin, arena);
    const int64_t table_offset = g && !per_position ? index * g->table_item_stride : 0;
    for_tokens(index, [&](const Tokens& tokens) {
      if (g)
        item.backward<T>(tokens, index, table_offset);
      else
        item.forward<T>(tokens);
    });
    if (g) item.flush(index);
  }
};

}  // namespace

void qk_norm_rope_forward(const QKNormRope& a) {
  const Work work(a);
  run_items(work, a.q.dtype, work.items, a.threads);
}
void qk_norm_rope_backward(const QKNormRopeBackward& g) {
  const Work work(g);
  run_items(work, g.forward.q.dtype, work.items, g.forward.threads);
}

}  // namespace vdcore::cpu::VDCORE_ISA
