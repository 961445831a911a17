// Norm and rope on the CPU, in Python.
#include "cpu/core/bindings.h"

#include "cpu/core/bindings_call.h"
#include "cpu/core/bindings_named.h"

namespace vdcore::cpu {
namespace {

NormRopeSizes sizes_of(const QKNormRope& a) {
  return {a.frame_start + a.q.size[1], a.q.size[2], a.q.size[3], a.k.size[3], a.q.size[4]};
}

QKNormRope qk_norm_rope_call(py::handle q, py::handle k, int64_t frame_start, py::handle norm, py::handle rope,
                             int threads) {
  QKNormRope args;
  args.q = query_view(q);
  const int64_t* n = args.q.size;
  args.k = cpu_view(k, 5);
  args.k = sized_view("k", k, {n[0], n[1], n[2], args.k.size[3], n[4]});
  require(args.k.dtype == args.q.dtype, "k must have the dtype of q");
  require(frame_start >= 0, "frame_start must be at least 0");
  args.frame_start = frame_start;
  args.norm = norm_of(norm, sizes_of(args));
  args.rope = rope_of(rope, sizes_of(args));
  args.threads = worthwhile_threads(threads, 8. * elements(args.q));
  return args;
}

// The kernel reads and writes all of a side in one dtype.
TensorView side_view(const char* name, py::handle capsule, const TensorView& x) {
  const TensorView v = like(name, capsule, x);
  if (v.dtype != x.dtype) throw py::type_error(std::string(name) + " must have the dtype of q and k");
  return v;
}

void qk_norm_rope_forward(py::handle q, py::handle k, py::handle q_out, py::handle k_out, int64_t frame_start,
                          py::handle norm, py::handle rope, int threads) {
  QKNormRope args = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  args.q_out = side_view("q_out", q_out, args.q);
  args.k_out = side_view("k_out", k_out, args.k);
  py::gil_scoped_release unlocked;
  kernels().qk_norm_rope_forward(args);
}

void qk_norm_rope_backward(py::handle q, py::handle k, py::handle dq_out, py::handle dk_out, py::handle dq,
                           py::handle dk, int64_t frame_start, py::handle norm, py::handle rope, int threads,
                           int64_t items, const std::vector<py::object>& weight_sums, py::handle dcos,
                           py::handle dsin) {
  QKNormRopeBackward args;
  const QKNormRope& f = args.forward = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  if (!dq_out.is_none()) {
    args.dq_out = side_view("dq_out", dq_out, f.q);
    args.dq = side_view("dq", dq, f.q);
  }
  if (!dk_out.is_none()) {
    args.dk_out = side_view("dk_out", dk_out, f.k);
    args.dk = side_view("dk", dk, f.k);
  }
  set_norm_rope_gradients(args, f.norm, f.rope, sizes_of(f), items, weight_sums, dcos, dsin);
  py::gil_scoped_release unlocked;
  kernels().qk_norm_rope_backward(args);
}

}  // namespace

void define_qk_norm_rope(py::module_& m) {
  define_named(m, "qk_norm_rope_forward", qk_norm_rope_forward, "q", "k", "q_out", "k_out", "frame_start", "norm",
               "rope", "threads");
  define_named(m, "qk_norm_rope_backward", qk_norm_rope_backward, "q", "k", "dq_out", "dk_out", "dq", "dk",
               "frame_start", "norm", "rope", "threads", "items", "weight_sums", "dcos", "dsin");
}

}  // namespace vdcore::cpu
