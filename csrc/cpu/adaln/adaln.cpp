// Adaptive layer norm, forward and backward: one pass over memory, one row of channels at a time.
#include "cpu/adaln/adaln.h"

#include "cpu/core/arena.h"
#include "cpu/core/items.h"
#include "cpu/core/token_rows.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

// Forward's rows need no sums: as many parts as balance well.
GroupSums forward_parts(const TensorView& x, int threads) {
  const int64_t rows = x.size[1] * x.size[2];
  return {false, smaller(rows, larger(64, 8 * threads))};
}

struct Moments {
  vf mean, rstd;
};
VDCORE_INLINE Moments moments(const Modulate& a, const float* x, int64_t n) {
  vf mean = {};
  if (a.kind == NormKind::layer)
    mean = splat(sum(sum_terms(n, [&](int64_t c) __attribute__((always_inline)) { return load(x + c); })) / n);
  const int64_t whole = n / W * W;
  vf squares = sum_terms(whole, [&](int64_t c) __attribute__((always_inline)) {
    const vf d = load(x + c) - mean;
    return d * d;
  });
  if (whole < n) {
    const vf d = select(iota() < static_cast<int32_t>(n - whole), load(x + whole) - mean, vf{});
    squares += d * d;
  }
  return {mean, splat(1.f / __builtin_sqrtf(sum(squares) / n + a.eps))};
}

// normed x -> y is slope * x + offset, with slope = weight * (1 + scale), offset = bias * (1 + scale) + shift.
class Coefficients {
 public:
  Coefficients(const Modulate& args, Arena& arena)
      : a(args),
        n(args.x.size[3]),
        shift(args.shift, arena.floats(round_up(n))),
        scale(args.scale, arena.floats(round_up(n))),
        weight(args.weight ? arena.floats(round_up(n)) : nullptr),
        bias(args.bias ? arena.floats(round_up(n)) : nullptr),
        slope(arena.floats(round_up(n))),
        offset(arena.floats(round_up(n))) {}

  void load_weights() const {
    if (weight) read_row<DType::f32>(reinterpret_cast<const char*>(a.weight), n, weight);
    if (bias) read_row<DType::f32>(reinterpret_cast<const char*>(a.bias), n, bias);
  }
  VDCORE_INLINE void move(int64_t b, int64_t t, int64_t s) {
    const bool other_shift = shift.move(b, t, s), other_scale = scale.move(b, t, s);
    if (!other_shift && !other_scale) return;
    for (int64_t c = 0; c < n; c += W) {
      const vf factor = 1.f + scale[c];
      store(slope + c, weight ? load(weight + c) * factor : factor);
      store(offset + c, bias ? load(bias + c) * factor + shift[c] : shift[c]);
    }
  }

 private:
  const Modulate& a;
  const int64_t n;

 public:
  SharedRow shift, scale;
  float *const weight, *const bias, *const slope, *const offset;
};

struct ModulateForward {
  const Modulate& a;
  Parts parts;
  bool stream;

  explicit ModulateForward(const Modulate& args)
      : a(args), parts(args.x, forward_parts(args.x, args.threads)), stream(streams(args.y)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = a.x.size[3];
    Arena count(nullptr);
    Coefficients(a, count);
    count.floats(round_up(n));
    Arena arena(scratch(count.used()));
    Coefficients k(a, arena);
    float* buffer = arena.floats(round_up(n));
    k.load_weights();
    const auto row = [&](int64_t b, int64_t t, int64_t s) {
      k.move(b, t, s);
      const float* x = row_floats<T>(a.x.at(b, t, s), n, buffer);
      const Moments m = moments(a, x, n);
      write_values<T>(a.y.at(b, t, s), n, stream, [&](int64_t c) __attribute__((always_inline)) {
        return (load(x + c) - m.mean) * m.rstd * load(k.slope + c) + load(k.offset + c);
      });
    };
    parts.for_rows(item, row, [] {});
  }
};

struct ModulateGradient {
  const ModulateBackward& g;
  const Modulate& a;
  Parts parts;
  bool stream;

  explicit ModulateGradient(const ModulateBackward& args)
      : g(args), a(args.forward), parts(a.x, args.sums), stream(streams(args.dx)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = a.x.size[3];
    Arena count(nullptr);
    Coefficients(a, count);
    for (int i = 0; i < 5; ++i) count.floats(round_up(n));
    Arena arena(scratch(count.used()));
    Coefficients k(a, arena);
    float *x_buffer = arena.floats(round_up(n)), *dy_buffer = arena.floats(round_up(n));
    const PartSum sum_dy(g.sum_dy, item, n, arena.floats(round_up(n))),
        sum_dz(g.sum_dz, item, n, arena.floats(round_up(n))), sum_dz_x(g.sum_dz_x, item, n, arena.floats(round_up(n)));
    k.load_weights();
    const auto row = [&](int64_t b, int64_t t, int64_t s) {
      k.move(b, t, s);
      const float* x = row_floats<T>(a.x.at(b, t, s), n, x_buffer);
      const float* dy = row_floats<T>(g.dy.at(b, t, s), n, dy_buffer);
      const Moments m = moments(a, x, n);
      const auto normed = [&](int64_t c) __attribute__((always_inline)) { return (load(x + c) - m.mean) * m.rstd; };
      const auto dz = [&](int64_t c) __attribute__((always_inline)) {
        return g.scale_per_token ? load(dy + c) * (1.f + k.scale[c]) : load(dy + c);
      };
      sum_dy.add([&](int64_t c) __attribute__((always_inline)) { return load(dy + c); });
      sum_dz.add(dz);
      sum_dz_x.add([&](int64_t c) __attribute__((always_inline)) { return dz(c) * normed(c); });
      if (g.dscale) write_dscale(k, b, t, s, dy, normed);
      if (!g.dx) return;
      vf slope = sum_terms(
          n, [&](int64_t c) __attribute__((always_inline)) { return load(dy + c) * load(k.slope + c) * normed(c); });
      vf mean = {};
      if (a.kind == NormKind::layer)
        mean = sum_terms(n, [&](int64_t c) __attribute__((always_inline)) { return load(dy + c) * load(k.slope + c); });
      slope = splat(sum(slope) / n);
      mean = splat(sum(mean) / n);
      write_values<T>(g.dx.at(b, t, s), n, stream, [&](int64_t c) __attribute__((always_inline)) {
        return (load(dy + c) * load(k.slope + c) - mean - normed(c) * slope) * m.rstd;
      });
    };
    parts.for_rows(item, row, [&] {
      sum_dy.flush();
      sum_dz.flush();
      sum_dz_x.flush();
    });
  }

 private:
  template <typename Normed>
  void write_dscale(const Coefficients& k, int64_t b, int64_t t, int64_t s, const float* dy,
                    const Normed& normed) const {
    with_dtype(g.dscale.dtype, [&](auto type) {
      write_values<decltype(type)::value>(g.dscale.at(b, t, s), a.x.size[3], false, [&](int64_t c) {
        vf z = normed(c);
        if (k.weight) z *= load(k.weight + c);
        if (k.bias) z += load(k.bias + c);
        return load(dy + c) * z;
      });
    });
  }
};

struct GateResidualForward {
  const GateResidual& a;
  Parts parts;
  bool stream;

  explicit GateResidualForward(const GateResidual& args)
      : a(args), parts(args.x, forward_parts(args.x, args.threads)), stream(streams(args.y)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = a.x.size[3];
    SharedRow gate(a.gate, reinterpret_cast<float*>(scratch(round_up(n) * sizeof(float))));
    const auto row = [&](int64_t b, int64_t t, int64_t s) {
      gate.move(b, t, s);
      const char *x = a.x.at(b, t, s), *residual = a.residual.at(b, t, s);
      write_values<T>(a.y.at(b, t, s), n, stream, [&](int64_t c) __attribute__((always_inline)) {
        return row_vector<T>(residual, n, c) + gate[c] * row_vector<T>(x, n, c);
      });
    };
    parts.for_rows(item, row, [] {});
  }
};

struct GateResidualGradient {
  const GateResidualBackward& g;
  Parts parts;
  bool stream;

  explicit GateResidualGradient(const GateResidualBackward& args)
      : g(args), parts(args.x, args.sums), stream(streams(args.dx)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = g.x.size[3];
    Arena arena(scratch(4 * (round_up(n) * sizeof(float) + 128)));
    SharedRow gate(g.gate, arena.floats(round_up(n)));
    float *x_buffer = arena.floats(round_up(n)), *dy_buffer = arena.floats(round_up(n));
    const PartSum sum(g.sum_dy_x, item, n, arena.floats(round_up(n)));
    const auto row = [&](int64_t b, int64_t t, int64_t s) {
      const float* dy = row_floats<T>(g.dy.at(b, t, s), n, dy_buffer);
      if (sum || g.dgate) {
        const float* x = row_floats<T>(g.x.at(b, t, s), n, x_buffer);
        const auto dgate = [&](int64_t c) __attribute__((always_inline)) { return load(dy + c) * load(x + c); };
        sum.add(dgate);
        if (g.dgate)
          with_dtype(g.dgate.dtype,
                     [&](auto type) { write_values<decltype(type)::value>(g.dgate.at(b, t, s), n, false, dgate); });
      }
      if (!g.dx) return;
      gate.move(b, t, s);
      write_values<T>(g.dx.at(b, t, s), n, stream,
                      [&](int64_t c) __attribute__((always_inline)) { return gate[c] * load(dy + c); });
    };
    parts.for_rows(item, row, [&] { sum.flush(); });
  }
};

}  // namespace

void modulate_forward(const Modulate& a) {
  const ModulateForward kernel(a);
  run_items(kernel, a.x.dtype, kernel.parts.items(), a.threads);
}
void modulate_backward(const ModulateBackward& g) {
  const ModulateGradient kernel(g);
  run_items(kernel, g.forward.x.dtype, kernel.parts.items(), g.forward.threads);
}
void gate_residual_forward(const GateResidual& a) {
  const GateResidualForward kernel(a);
  run_items(kernel, a.x.dtype, kernel.parts.items(), a.threads);
}
void gate_residual_backward(const GateResidualBackward& g) {
  const GateResidualGradient kernel(g);
  run_items(kernel, g.x.dtype, kernel.parts.items(), g.threads);
}

}  // namespace vdcore::cpu::VDCORE_ISA
