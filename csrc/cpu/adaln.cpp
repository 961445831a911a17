// Adaptive layer norm, forward and backward: one pass over memory, a few rows of channels at a time.
#include "cpu/adaln.h"

#include "cpu/arena.h"
#include "cpu/four_rows.h"
#include "cpu/items.h"
#include "cpu/kernels.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

// Forward's rows need no sums: parts that balance well, each of enough rows to be worth reading shift and scale for.
GroupSums forward_parts(const TensorView& x, int threads) {
  const int64_t rows = x.size[1] * x.size[2];
  return {false, larger(1, smaller(rows / 16, 8 * threads))};
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
  VDCORE_INLINE void move(const Token& token) {
    const bool other_shift = shift.move(token), other_scale = scale.move(token);
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

// Buffers for four rows.
struct FourBuffers {
  float* row[kRows];
  FourBuffers(int64_t n, Arena& arena) {
    for (float*& r : row) r = arena.floats(round_up(n));
  }
  template <DType T>
  VDCORE_INLINE void read(const TensorView& x, const Token (&tokens)[kRows], const float* (&out)[kRows]) const {
    for (int r = 0; r < kRows; ++r) out[r] = row_floats<T>(at(x, tokens[r]), x.size[3], row[r]);
  }
};

struct ModulateForward {
  const Modulate& a;
  Parts parts;
  bool stream;

  explicit ModulateForward(const Modulate& args)
      : a(args), parts(args.x, forward_parts(args.x, args.threads)), stream(may_stream(args.y)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = a.x.size[3];
    Arena count(nullptr);
    Coefficients(a, count);
    FourBuffers(n, count);
    Arena arena(scratch(count.used()));
    Coefficients k(a, arena);
    const FourBuffers buffers(n, arena);
    k.load_weights();
    const auto rows = [&](const Token(&tokens)[kRows], int count) {
      FourRows x;
      buffers.read<T>(a.x, tokens, x);
      const Moments m(a.kind, a.eps, x, n);
      if (!stream && count == kRows && k.shift.same(tokens) && k.scale.same(tokens)) {
        k.move(tokens[0]);
        return write_four<T>(k, tokens, x, m);
      }
      for (int r = 0; r < count; ++r) {
        k.move(tokens[r]);
        const float* row = x[r];
        const vf mean = splat(m.mean[r]), rstd = splat(m.rstd[r]);
        write_values<T>(at(a.y, tokens[r]), n, stream, [&](int64_t c) __attribute__((always_inline)) {
          return (load(row + c) - mean) * rstd * load(k.slope + c) + load(k.offset + c);
        });
      }
    };
    parts.for_rows<kRows>(item, rows, [] {});
  }

 private:
  template <DType T>
  VDCORE_INLINE void write_four(const Coefficients& k, const Token (&tokens)[kRows], const FourRows& x,
                                const Moments& m) const {
    struct Line {
      vf slope, offset;
    };
    char* y[kRows];
    vf mean[kRows], rstd[kRows];
    for (int r = 0; r < kRows; ++r) y[r] = at(a.y, tokens[r]), mean[r] = splat(m.mean[r]), rstd[r] = splat(m.rstd[r]);
    const auto shared = [&](int64_t c)
                            __attribute__((always_inline)) { return Line{load(k.slope + c), load(k.offset + c)}; };
    write_rows<T>(y, a.x.size[3], shared, [&](int r, int64_t c, const Line& line) __attribute__((always_inline)) {
      return (load(x[r] + c) - mean[r]) * rstd[r] * line.slope + line.offset;
    });
  }
};

struct ModulateGradient {
  const ModulateBackward& g;
  const Modulate& a;
  Parts parts;
  bool stream;

  explicit ModulateGradient(const ModulateBackward& args)
      : g(args), a(args.forward), parts(a.x, args.sums), stream(may_stream(args.dx)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = a.x.size[3];
    Arena count(nullptr);
    Coefficients(a, count);
    FourBuffers(n, count);
    for (int i = 0; i < 4; ++i) count.floats(round_up(n));
    Arena arena(scratch(count.used()));
    Coefficients k(a, arena);
    const FourBuffers buffers(n, arena);
    float* dy_buffer = arena.floats(round_up(n));
    const PartSum sum_dy(g.sum_dy, item, n, arena.floats(round_up(n))),
        sum_dz(g.sum_dz, item, n, arena.floats(round_up(n))), sum_dz_x(g.sum_dz_x, item, n, arena.floats(round_up(n)));
    k.load_weights();
    const auto row = [&](const Token& token, const float* x, vf row_mean, vf rstd) {
      k.move(token);
      const float* dy = row_floats<T>(at(g.dy, token), n, dy_buffer);
      const auto normed = [&](int64_t c) __attribute__((always_inline)) { return (load(x + c) - row_mean) * rstd; };
      const auto dz = [&](int64_t c) __attribute__((always_inline)) {
        return g.scale_per_token ? load(dy + c) * (1.f + k.scale[c]) : load(dy + c);
      };
      sum_dy.add([&](int64_t c) __attribute__((always_inline)) { return load(dy + c); });
      sum_dz.add(dz);
      sum_dz_x.add([&](int64_t c) __attribute__((always_inline)) { return dz(c) * normed(c); });
      if (g.dscale) write_dscale(k, token, dy, normed);
      if (!g.dx) return;
      vf slope = sum_terms(
          n, [&](int64_t c) __attribute__((always_inline)) { return load(dy + c) * load(k.slope + c) * normed(c); });
      vf mean = {};
      if (a.kind == NormKind::layer)
        mean = sum_terms(n, [&](int64_t c) __attribute__((always_inline)) { return load(dy + c) * load(k.slope + c); });
      slope = splat(sum(slope) / n);
      mean = splat(sum(mean) / n);
      write_values<T>(at(g.dx, token), n, stream, [&](int64_t c) __attribute__((always_inline)) {
        return (load(dy + c) * load(k.slope + c) - mean - normed(c) * slope) * rstd;
      });
    };
    const auto rows = [&](const Token(&tokens)[kRows], int count) {
      FourRows x;
      buffers.read<T>(a.x, tokens, x);
      const Moments m(a.kind, a.eps, x, n);
      for (int r = 0; r < count; ++r) row(tokens[r], x[r], splat(m.mean[r]), splat(m.rstd[r]));
    };
    parts.for_rows<kRows>(item, rows, [&] {
      sum_dy.flush();
      sum_dz.flush();
      sum_dz_x.flush();
    });
  }

 private:
  template <typename Normed>
  void write_dscale(const Coefficients& k, const Token& token, const float* dy, const Normed& normed) const {
    with_dtype(g.dscale.dtype, [&](auto type) {
      write_values<decltype(type)::value>(at(g.dscale, token), a.x.size[3], false, [&](int64_t c) {
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
      : a(args), parts(args.x, forward_parts(args.x, args.threads)), stream(may_stream(args.y)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = a.x.size[3];
    SharedRow gate(a.gate, reinterpret_cast<float*>(scratch(round_up(n) * sizeof(float))));
    const auto row = [&](const Token(&token)[1], int) {
      gate.move(token[0]);
      const char *x = at(a.x, token[0]), *residual = at(a.residual, token[0]);
      write_values<T>(at(a.y, token[0]), n, stream, [&](int64_t c) __attribute__((always_inline)) {
        return row_vector<T>(residual, n, c) + gate[c] * row_vector<T>(x, n, c);
      });
    };
    parts.for_rows<1>(item, row, [] {});
  }
};

struct GateResidualGradient {
  const GateResidualBackward& g;
  Parts parts;
  bool stream;

  explicit GateResidualGradient(const GateResidualBackward& args)
      : g(args), parts(args.x, args.sums), stream(may_stream(args.dx)) {}

  template <DType T>
  void run(int64_t item) const {
    const int64_t n = g.x.size[3];
    Arena arena(scratch(4 * (round_up(n) * sizeof(float) + 128)));
    SharedRow gate(g.gate, arena.floats(round_up(n)));
    float *x_buffer = arena.floats(round_up(n)), *dy_buffer = arena.floats(round_up(n));
    const PartSum sum(g.sum_dy_x, item, n, arena.floats(round_up(n)));
    const auto row = [&](const Token(&tokens)[1], int) {
      const Token& token = tokens[0];
      const float* dy = row_floats<T>(at(g.dy, token), n, dy_buffer);
      if (sum || g.dgate) {
        const float* x = row_floats<T>(at(g.x, token), n, x_buffer);
        const auto dgate = [&](int64_t c) __attribute__((always_inline)) { return load(dy + c) * load(x + c); };
        sum.add(dgate);
        if (g.dgate)
          with_dtype(g.dgate.dtype,
                     [&](auto type) { write_values<decltype(type)::value>(at(g.dgate, token), n, false, dgate); });
      }
      if (!g.dx) return;
      gate.move(token);
      write_values<T>(at(g.dx, token), n, stream,
                      [&](int64_t c) __attribute__((always_inline)) { return gate[c] * load(dy + c); });
    };
    parts.for_rows<1>(item, row, [&] { sum.flush(); });
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
