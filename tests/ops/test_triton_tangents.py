"""Tangents of attention on the Triton kernels, under the interpreter."""

import pytest
import torch
from support import backends_of

import vdcore
from vdcore import FrameMask
from vdcore.testing import CASES, directions, judge_tangents, of_leaves

pytestmark = pytest.mark.skipif("triton" not in backends_of("temporal_attention"), reason="needs triton")

OPS = ("temporal_attention", "spatial_attention", "video_attention", "cross_attention", "gated_attention")
SERVED = [c for c in CASES if c.op in OPS and not {"windows", "bias"} & set(c.tags)]
# One by one: a tangent of q alone, of k alone, ... compiles to a kernel of its own.
ALONE = [c for c in SERVED if c.name in ("plain", "text", "grouped heads", "lengths")]


def pushes(op):
    return vdcore.calls()[op, "triton", "jvp"]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_tangents_obey_the_tolerance_rule(case, dtype):
    before = pushes(case.op)
    ratios = judge_tangents(case, "triton", dtype, seeds=1)
    assert all(r.worst <= 1 for r in ratios.values()), ratios
    assert pushes(case.op) == before + 1


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_each_tangent_alone(case):
    """Against the formula in float64."""
    inputs, exact = case.inputs(torch.float32), case.inputs(torch.float32, stored=torch.float64)
    dx = directions(inputs)
    before = pushes(case.op)
    for i in range(len(dx)):

        def of_one(inputs, x, backend, i=i):
            leaves = list(inputs.leaves.values())
            f = of_leaves(inputs, getattr(vdcore, case.op), backend=backend)
            return torch.func.jvp(lambda leaf: f(*leaves[:i], leaf, *leaves[i + 1 :]), (leaves[i],), (x,))[1]

        found, expected = of_one(inputs, dx[i], "triton"), of_one(exact, dx[i].double(), "reference")
        for x, y in zip(found, expected, strict=True):
            most = float(y.abs().max()) if y.numel() else 0
            torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-5 * most + 1e-6)
    assert pushes(case.op) == before + len(dx)


def qkv(*shape, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for _ in range(6)]


def pushed(f, x, dx, **kwargs):
    return torch.func.jvp(lambda *x: f(*x, **kwargs, return_lse=True), tuple(x), tuple(dx))[1]


EACH = [vdcore.temporal_attention, vdcore.video_attention]


@pytest.mark.parametrize("f", EACH)
def test_a_tangent_of_scores_with_a_mean_cancels(f):
    """Along dk that is one vector for all keys only lse moves."""
    q, k, v, _, dk, _ = qkv(1, 5, 9, 2, 16, dtype=torch.float16)
    dk = dk[:1, :1, :1].expand(k.shape) * 30
    dout, dlse = torch.func.jvp(
        lambda k: f(q, k, v, mask=FrameMask.causal(), return_lse=True, backend="triton"), (k,), (dk,)
    )[1]
    expected = torch.einsum("btshd,btshd->btsh", q.float(), dk.float()) / 4
    assert expected.abs().max() > 50 and dout.abs().max() < 0.05
    torch.testing.assert_close(dlse, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("f", EACH)
def test_scales_that_are_not_positive(f, scale):
    q, k, v, *dx = qkv(1, 3, 20, 2, 16)
    found, expected = (pushed(f, (q, k, v), dx, scale=scale, backend=b) for b in ("triton", "reference"))
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("f", EACH)
def test_what_is_invisible_is_not_read(f):
    """NaN in keys that no frame sees, in tangents of them, and beside tokens."""
    q, k, v, *dx = qkv(1, 4, 3, 2, 16)
    more = {"mask": FrameMask.causal(), "lengths": torch.tensor([2]), "backend": "triton"}
    expected = pushed(f, (q, k, v), dx, **more)
    wide = [torch.full((1, 4, 4, 2, 16), torch.nan) for _ in range(6)]
    for x, y in zip(wide, (q, k, v, *dx)):
        x[:, :, :3] = y
    for x in wide[1:3] + wide[4:]:
        x[:, 2:] = torch.nan
    found = pushed(f, [x[:, :, :3] for x in wide[:3]], [x[:, :, :3] for x in wide[3:]], **more)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x[:, :2], y[:, :2])
        assert not x[:, 2:].any()


@pytest.mark.parametrize("f", EACH)
def test_what_is_not_finite_and_seen_comes_out(f):
    """Of one frame: the frames that see it, no others."""
    q, k, v, *dx = qkv(1, 4, 3, 2, 16)
    for x in (k, v, *dx[1:]):
        for bad in (torch.nan, torch.inf):
            good, x[0, 2, 1, 0, 3] = x[0, 2, 1, 0, 3].clone(), bad
            dout, dlse = pushed(f, (q, k, v), dx, mask=FrameMask.causal(), backend="triton")
            x[0, 2, 1, 0, 3] = good
            assert dout[:, :2].isfinite().all() and dlse[:, :2].isfinite().all()
            rows = dout[0, 2:, 1 if f is vdcore.temporal_attention else slice(None), 0]
            assert not rows[..., 3].isfinite().any(), (bad, rows)


def test_who_computes_what():
    """Said by explain: masks of a grid, and float32 of many channels."""
    q = torch.randn(1, 2, 4, 1, 128)
    for more, reason in (
        ({"mask": vdcore.GridMask.neighborhood((1, 1, 1)), "grid": (2, 2)}, "its tangents know no GridMask"),
        ({}, "its tangents of float32 have at most 96 channels, got 128"),
    ):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, q)
            rows = vdcore.explain("video_attention", dual, q, q, backend="triton", **more)
        assert rows[-1] == ("tangents", f"by the formula in torch's operators: {reason}")
