// Temporal attention on the CPU, in Python.
#include "cpu/core/bindings.h"

#include "common/visible_frames.h"
#include "cpu/core/bindings_call.h"
#include "cpu/core/bindings_named.h"

namespace vdcore::cpu {
namespace {

NormRopeSizes sizes_of(const TemporalAttention& a) {
  return {larger(a.k.size[1], a.q_start + a.q.size[1]), a.q.size[2], a.q.size[3], a.k.size[3], a.q.size[4]};
}

TemporalAttention temporal_arguments(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                     const Lengths& lengths, int64_t q_start, float scale, py::handle norm,
                                     py::handle rope, py::handle bias, int threads) {
  TemporalAttention args;
  if (k.is_none() && v.is_none()) {
    const auto [q_part, k_part, v_part] = parts_of(cpu_view(q, 6));
    args.q = checked_queries(q_part), args.k = k_part, args.v = v_part;
  } else {
    args.q = query_view(q);
    args.k = key_view(k, args.q);
    args.v = like("v", v, args.k);
  }
  require(args.v.dtype == args.q.dtype, "v must have the dtype of q");
  require(args.k.size[2] == args.q.size[2], "k must have as many tokens per frame as q");
  args.out = like("out", out, args.q);
  args.lse = row_view("lse", lse, {args.q.size[0], args.q.size[1], args.q.size[2], args.q.size[3]});
  check_lengths(lengths, args.q.size[0]);
  require(q_start >= 0, "q_start must be at least 0");
  args.q_start = q_start;
  args.scale = scale;
  args.norm = norm_of(norm, sizes_of(args));
  args.rope = rope_of(rope, sizes_of(args));
  if (!bias.is_none()) {
    const dlpack::Tensor& t = cpu_tensor(bias);
    require(t.ndim == 3, "bias must have three dimensions");
    args.bias_heads = t.shape[0] == 1 ? 1 : args.q.size[3];
    args.bias_row = (args.q.size[1] + 15) / 16 * 16;  // the longest vector has 16 floats
    args.bias = floats("bias", bias, {args.bias_heads, args.k.size[1], args.bias_row});
  }
  args.threads = worthwhile_threads(threads, 2. * elements(args.q) * static_cast<double>(args.k.size[1]));
  return args;
}

struct TemporalArguments {
  TemporalAttention args;
  VisibleTables tables;

  TemporalArguments(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, const Lengths& lengths,
                    const std::vector<int64_t>& mask, int64_t q_start, float scale, py::handle norm, py::handle rope,
                    py::handle bias, int threads)
      : args(temporal_arguments(q, k, v, out, lse, lengths, q_start, scale, norm, rope, bias, threads)),
        tables(checked_mask(mask), args.q.size[1], args.k.size[1], q_start, data_of(lengths), args.q.size[0]) {
    args.visible = {tables.begin.data(),
                    tables.end.data(),
                    tables.low_begin.data(),
                    tables.low_end.data(),
                    tables.seen_begin.data(),
                    tables.seen_end.data(),
                    tables.also_begin.data(),
                    tables.also_end.data(),
                    tables.per_sample,
                    tables.dense,
                    tables.twice};
  }
};

void temporal_attention_forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                const Lengths& lengths, const std::vector<int64_t>& mask, int64_t q_start, float scale,
                                py::handle norm, py::handle rope, py::handle bias, int threads) {
  const TemporalArguments arguments(q, k, v, out, lse, lengths, mask, q_start, scale, norm, rope, bias, threads);
  py::gil_scoped_release unlocked;
  kernels().temporal_attention_forward(arguments.args);
}

void temporal_attention_backward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                 const Lengths& lengths, const std::vector<int64_t>& mask, int64_t q_start, float scale,
                                 py::handle norm, py::handle rope, py::handle bias, int threads, py::handle dout,
                                 py::handle dlse, py::handle dq, py::handle dk, py::handle dv, int64_t items,
                                 const std::vector<py::object>& weight_sums, py::handle dcos, py::handle dsin,
                                 py::handle dbias) {
  const TemporalArguments arguments(q, k, v, out, lse, lengths, mask, q_start, scale, norm, rope, bias, threads);
  TemporalAttentionBackward args;
  const TemporalAttention& f = args.forward = arguments.args;
  require(static_cast<bool>(f.lse), "backward needs lse");
  args.dout = like("dout", dout, f.q);
  args.dlse = row_view("dlse", dlse, {f.q.size[0], f.q.size[1], f.q.size[2], f.q.size[3]});
  if (k.is_none()) {
    const int64_t* n = f.q.size;
    const auto [dq_part, dk_part, dv_part] = parts_of(sized_view("dq", dq, {n[0], n[1], n[2], 3, n[3], n[4]}));
    args.dq = dq_part, args.dk = dk_part, args.dv = dv_part;
  } else {
    args.dq = optional_like("dq", dq, f.q);
    args.dk = optional_like("dk", dk, f.k);
    args.dv = optional_like("dv", dv, f.k);
  }
  set_norm_rope_gradients(args, f.norm, f.rope, sizes_of(f), items, weight_sums, dcos, dsin);
  require(dbias.is_none() || f.bias, "there is no bias to have a gradient");
  args.dbias = floats("dbias", dbias, {items, f.bias_heads, f.k.size[1], f.bias_row});
  py::gil_scoped_release unlocked;
  kernels().temporal_attention_backward(args);
}

// q and k normed and rotated, out and lse of forward; dq, dk, dv and dbias may be None.
void temporal_attention_tangents(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                 const Lengths& lengths, const std::vector<int64_t>& mask, int64_t q_start, float scale,
                                 py::handle bias, int threads, py::handle dq, py::handle dk, py::handle dv,
                                 py::handle dbias, py::handle dout, py::handle dlse) {
  const TemporalArguments arguments(q, k, v, out, lse, lengths, mask, q_start, scale, py::none(), py::none(), bias,
                                    threads);
  TemporalTangents args;
  const TemporalAttention& f = args.forward = arguments.args;
  args.dq = optional_like("dq", dq, f.q);
  args.dk = optional_like("dk", dk, f.k);
  args.dv = optional_like("dv", dv, f.k);
  require(dbias.is_none() || f.bias, "there is no bias to have a tangent");
  args.dbias = floats("dbias", dbias, {f.bias_heads, f.k.size[1], f.bias_row});
  args.dout = like("dout", dout, f.q);
  args.dlse = row_view("dlse", dlse, {f.q.size[0], f.q.size[1], f.q.size[2], f.q.size[3]});
  require(f.lse && args.dlse, "lse and dlse must be given");
  require(args.dout.dtype == f.out.dtype, "dout must have the dtype of out");
  py::gil_scoped_release unlocked;
  kernels().temporal_attention_tangents(args);
}

}  // namespace

void define_temporal_attention(py::module_& m) {
  define_named(m, "temporal_attention_forward", temporal_attention_forward, "q", "k", "v", "out", "lse", "lengths",
               "mask", "q_start", "scale", "norm", "rope", "bias", "threads");
  define_named(m, "temporal_attention_backward", temporal_attention_backward, "q", "k", "v", "out", "lse", "lengths",
               "mask", "q_start", "scale", "norm", "rope", "bias", "threads", "dout", "dlse", "dq", "dk", "dv", "items",
               "weight_sums", "dcos", "dsin", "dbias");
  define_named(m, "temporal_attention_tangents", temporal_attention_tangents, "q", "k", "v", "out", "lse", "lengths",
               "mask", "q_start", "scale", "bias", "threads", "dq", "dk", "dv", "dbias", "dout", "dlse");
}

}  // namespace vdcore::cpu
