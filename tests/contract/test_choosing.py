"""Choosing a backend: nothing falls back silently, and everything that was chosen can be read."""

import threading

import pytest
import torch
from support import FAST, run_python
from torch._subclasses.fake_tensor import FakeTensorMode

import vdcore
from vdcore import FrameMask
from vdcore.ops import choose
from vdcore.ops.operator import capture


def qkv(**kwargs):
    return [torch.randn(1, 4, 3, 2, 8, **kwargs) for _ in range(3)]


def served(op="temporal_attention"):
    return {(b, d): n for (o, b, d), n in vdcore.calls().items() if o == op}


def difference(before, after):
    return {key: n - before.get(key, 0) for key, n in after.items() if n != before.get(key, 0)}


def test_auto_takes_the_first_that_can():
    before = served()
    vdcore.temporal_attention(*qkv())
    assert difference(before, served()) == {("cpu", "fwd"): 1}
    before = served()
    vdcore.temporal_attention(*qkv(dtype=torch.float64))
    assert difference(before, served()) == {("reference", "fwd"): 1}


def test_order_of_names():
    """The call's own name wins over use_backend, and that over the environment."""
    before = served()
    with vdcore.use_backend("reference"):
        vdcore.temporal_attention(*qkv())
        vdcore.temporal_attention(*qkv(), backend="cpu")
        with vdcore.use_backend("sdpa"):
            vdcore.temporal_attention(*qkv())
        vdcore.temporal_attention(*qkv(), backend="auto")
    assert difference(before, served()) == {("reference", "fwd"): 1, ("cpu", "fwd"): 2, ("sdpa", "fwd"): 1}


def test_environment():
    code = "import torch, vdcore; q = torch.randn(1, 4, 3, 2, 8); vdcore.temporal_attention(q, q, q); "
    code += "print(list(vdcore.calls()))"
    assert "'reference'" in run_python(code, VDCORE_BACKEND="reference")
    with pytest.raises(AssertionError, match="VDCORE_BACKEND must be one of auto, reference"):
        run_python(code, VDCORE_BACKEND="nonsense")


def test_backward_keeps_the_backend_of_forward():
    q, k, v = qkv(requires_grad=True)
    before = served()
    with vdcore.use_backend("reference"):
        out = vdcore.temporal_attention(q, k, v)
    out.sum().backward()
    assert difference(before, served()) == {("reference", "fwd"): 1, ("reference", "bwd"): 1}


def test_threads_choose_for_themselves():
    seen = []

    def other():
        before = served()
        vdcore.temporal_attention(*qkv())
        seen.append(difference(before, served()))

    with vdcore.use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [{("cpu", "fwd"): 1}]


def test_a_named_backend_that_cannot_says_why():
    q, k, v = qkv(dtype=torch.float64)
    with pytest.raises(vdcore.BackendError, match=r"temporal_attention: backend 'cpu' cannot run .* no torch.float64"):
        vdcore.temporal_attention(q, k, v, backend="cpu")
    with pytest.raises(vdcore.BackendError, match="mask"):
        vdcore.temporal_attention(*qkv(), mask=FrameMask.causal(), backend="sdpa")
    big = [torch.randn(1, 2, 1, 1, 264) for _ in range(3)]
    with pytest.raises(vdcore.BackendError, match="head_dim must be at most 256, got 264"):
        vdcore.temporal_attention(*big, backend="cpu")
    assert isinstance(vdcore.BackendError("x"), RuntimeError)


def test_a_named_backend_without_the_backward_raises_at_forward(monkeypatch):
    from dataclasses import replace

    from vdcore.ops.choose import BACKENDS

    operators = dict(BACKENDS["cpu"].operators)
    operators["temporal_attention"] = replace(operators["temporal_attention"], backward=None)
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], operators=operators))
    vdcore.temporal_attention(*qkv(), backend="cpu")
    q, k, v = qkv(requires_grad=True)
    with pytest.raises(vdcore.BackendError, match="has no backward of temporal_attention"):
        vdcore.temporal_attention(q, k, v, backend="cpu")
    # Under auto the two directions may differ.
    before = served()
    vdcore.temporal_attention(q, k, v).sum().backward()
    assert difference(before, served()) == {("cpu", "fwd"): 1, ("sdpa", "bwd"): 1}


def test_dense_attention_goes_to_torch_on_a_gpu():
    """Until measured rows say otherwise; whatever is more than that goes to the kernels."""
    with FakeTensorMode():
        q = torch.empty(1, 4, 6, 2, 64, dtype=torch.bfloat16, device="cuda")
        text = torch.empty(1, 5, 2, 64, dtype=torch.bfloat16, device="cuda")
        lengths = torch.empty(1, dtype=torch.int64, device="cuda")
        dense = [capture(f, q, q, q) for f in (vdcore.video_attention, vdcore.spatial_attention)]
        dense.append(capture(vdcore.cross_attention, q, text, text))
        others = [
            capture(vdcore.video_attention, q, q, q, mask=FrameMask.causal()),
            capture(vdcore.video_attention, q, q, q, lengths=lengths),
            capture(vdcore.video_attention, q, q, q, text=(text, text, text)),
            capture(vdcore.cross_attention, q, text, text, lengths=lengths),
            capture(vdcore.temporal_attention, q, q, q),
        ]
        assert [choose.candidates(call)[:2] for call in dense] == [("sdpa", "triton")] * 3
        assert [choose.candidates(call)[0] for call in others] == ["triton"] * 5


def test_explain():
    reasons = vdcore.explain("temporal_attention", *qkv(), mask=FrameMask.causal())
    names = [name for name, _ in reasons]
    assert set(names) == set(vdcore.backends()) and names[0] == "cpu" and reasons[0][1] is None
    usable = [reason is None for _, reason in reasons]
    assert usable == sorted(usable, reverse=True), "usable ones first"
    assert "mask" in dict(reasons)["sdpa"]
    with pytest.raises(ValueError, match="q must be"):
        vdcore.explain("temporal_attention", torch.randn(3), torch.randn(3), torch.randn(3))


def test_backends_says_what_is_missing():
    found = vdcore.backends()
    assert found["reference"] is None and found["sdpa"] is None and found["cpu"] is None
    if not torch.cuda.is_available():
        said = run_python("import vdcore; print(vdcore.backends()['cuda'])", VDCORE_CUDA_EMULATE=0)
        assert "CUDA" in said


@pytest.mark.parametrize("backend", [name for name in FAST if name != "sdpa"])  # which has no gradient of lse
@pytest.mark.parametrize("op", ["temporal_attention", "video_attention", "cross_attention"])
def test_autocast_changes_nothing_inside_of_a_backend(op, backend):
    """Of tensors in its dtype the results, lse and gradients are what they are outside of it, bit by bit."""
    attend = getattr(vdcore, op)
    q = torch.randn(1, 3, 5, 2, 16, dtype=torch.bfloat16)
    k = q[:, 0] if op == "cross_attention" else q

    def results():
        x, y = (z.detach().clone().requires_grad_() for z in (q, k))
        more = {} if op == "cross_attention" else {"return_lse": True}
        out = attend(x, y, y, backend=backend, **more)
        out = out if isinstance(out, tuple) else (out,)
        return *out, *torch.autograd.grad(sum(z.float().square().sum() for z in out), (x, y))

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast))


def test_autocast():
    """Attention and patches take the autocast dtype; the norms keep theirs."""
    q, k, v = qkv()
    x = torch.randn(1, 2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vdcore.temporal_attention(q, k, v).dtype == torch.bfloat16
        assert vdcore.spatial_attention(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert vdcore.cross_attention(q, x[0, :1].view(1, 3, 1, 8), x[0, :1].view(1, 3, 1, 8)).dtype == torch.bfloat16
        assert vdcore.patchify(torch.randn(1, 3, 2, 4, 4), torch.randn(5, 3, 1, 2, 2)).dtype == torch.bfloat16
        assert vdcore.qk_norm_rope(q, k)[0].dtype == torch.float32
        assert vdcore.modulate(x, x[:, 0, 0], x[:, 0, 0]).dtype == torch.float32
        leaf = q.clone().requires_grad_()
        vdcore.temporal_attention(leaf, k, v).float().sum().backward()
        assert leaf.grad.dtype == torch.float32


def test_mixed_precision_arguments():
    """Norm weights and tables may be float32 beside half-precision q; their gradients keep their own dtype."""
    q, k, v = (x.bfloat16().requires_grad_() for x in qkv())
    weight = torch.ones(8, requires_grad=True)
    table = torch.ones(4, 1, 4, requires_grad=True)
    out = vdcore.temporal_attention(q, k, v, norm=vdcore.QKNorm(weight, None), rope=vdcore.Rope(table, table))
    out.float().square().sum().backward()
    assert out.dtype == q.grad.dtype == torch.bfloat16 and weight.grad.dtype == table.grad.dtype == torch.float32
