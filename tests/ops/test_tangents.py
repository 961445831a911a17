"""Tangents of attention on the CPU engine: edges of tiles, masks, what is hidden, values that are no numbers."""

import pytest
import torch

import vdcore
from vdcore import FrameMask, GridMask, QKNorm, Rope, TileLists
from vdcore.testing import Case, judge_tangents

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MASKS = {
    "full": FrameMask(),
    "causal": FrameMask.causal(),
    "runs": FrameMask(past=3, future=2, chunk=2, sink=3),
    "shots": FrameMask(past=2, future=0, shots=(0, 5)),
}


def qkv(d, *shape, **more):
    return {name: d(name, *shape) for name in "qkv"} | {"return_lse": True} | more


@DTYPES
@pytest.mark.parametrize("T", [1, 3, 8, 9, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_frames(T, mask, dtype):
    """Lengths around the edges of tiles of every instruction set, and of blocks of 64 queries."""
    case = Case("temporal_attention", f"{T} frames", lambda d: qkv(d, 1, T, 3, 2, 20, mask=mask))
    assert all(r.worst <= 1 for r in judge_tangents(case, "cpu", dtype).values())


@DTYPES
@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_teacher_forcing_and_grouped_heads(scale, dtype):
    def build(d):
        return {
            "q": d("q", 2, 12, 3, 4, 24),
            "k": d("k", 2, 12, 3, 2, 24),
            "v": d("v", 2, 12, 3, 2, 24),
            "mask": FrameMask.teacher_forcing(6, chunk=2),
            "scale": scale,
            "return_lse": True,
        }

    ratios = judge_tangents(Case("temporal_attention", "grouped", build), "cpu", dtype)
    assert all(r.worst <= 1 for r in ratios.values())


NORMS = [(kind, over) for kind in ("rms", "layer") for over in ("head", "all")]


@DTYPES
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("kind,over", NORMS)
@pytest.mark.parametrize("op", ["temporal_attention", "spatial_attention"])
def test_behind_norm_and_rope(op, kind, over, style, dtype):
    """Whose weights and tables have no tangents of their own."""
    T, S, H, D = 5, 6, 4, 24
    weight, angle = torch.linspace(0.5, 1.5, D if over == "head" else H * D), torch.linspace(0, 3, T * S * 10)
    table = angle.view(T, S, 10)
    norm = QKNorm(weight, weight.flip(0), kind, over, q_bias=weight - 1 if kind == "layer" else None)
    rope = Rope(table.cos(), table.sin(), style)
    case = Case(op, "norm and rope", lambda d: qkv(d, 2, T, S, H, D, norm=norm, rope=rope))
    assert all(r.worst <= 1 for r in judge_tangents(case, "cpu", dtype).values())


WINDOWS = {
    "neighborhood": GridMask.neighborhood((3, 5, 5)),
    "causal tiles": GridMask(frames=FrameMask(past=2, future=0, chunk=2), rows=1, columns=(2, 1), tile=(2, 2, 3)),
    "radial": GridMask.radial(5, 9),
}


@DTYPES
@pytest.mark.parametrize("mask", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("D", [20, 64])
def test_windows(mask, D, dtype):
    case = Case("video_attention", "windows", lambda d: qkv(d, 1, 6, 45, 2, D, mask=mask, grid=(5, 9)))
    assert all(r.worst <= 1 for r in judge_tangents(case, "cpu", dtype).values())


def pushed(f, x, dx, **kwargs):
    return torch.func.jvp(lambda *x: f(*x, **kwargs, return_lse=True), tuple(x), tuple(dx))[1]


LISTS = TileLists(torch.tensor([[[[0, 1], [1, 0], [0, 2]]]], dtype=torch.int32), torch.tensor([[[2, 1, 2]]]).int())
HIDING = {
    "temporal": (vdcore.temporal_attention, {"mask": FrameMask(past=1, future=0, sink=1)}),
    "video": (vdcore.video_attention, {"mask": FrameMask(past=1, future=0, sink=1)}),
    "windows": (vdcore.video_attention, {"mask": GridMask(FrameMask.causal(), rows=0, columns=1), "grid": (3, 3)}),
    "lists": (vdcore.tile_attention, {"tiles": LISTS, "tile": (2, 3, 3), "grid": (3, 3)}),
}


def reach(f, bad, kwargs):
    """Query frames and tokens that see token 4 of frame ``bad``: what is NaN where its value is."""
    x = torch.randn(1, 6, 9, 1, 8)
    v = x.clone()
    v[:, bad, 4] = torch.nan
    return f(x, x, v, backend="reference", **kwargs)[0, :, :, 0, 0].isnan()


@DTYPES
@pytest.mark.parametrize("what", ["k", "v", "dk", "dv"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", HIDING)
def test_what_is_hidden_stays_hidden(name, value, what, dtype):
    """No number in a key, a value or their tangent reaches the queries that see it, and no other."""
    f, kwargs = HIDING[name]
    tensors = dict(zip(("q", "k", "v", "dq", "dk", "dv"), torch.randn(6, 1, 6, 9, 2, 24).to(dtype)))
    clean = pushed(f, *_halves(tensors), **kwargs)
    seen = reach(f, 2, kwargs)
    assert seen.any() and not seen.all()
    tensors[what] = tensors[what].clone()
    tensors[what][:, 2, 4, :, 3] = value
    poisoned = pushed(f, *_halves(tensors), **kwargs)
    for x, y in zip(poisoned, clean):
        torch.testing.assert_close(x[0, ~seen], y[0, ~seen], rtol=2e-2, atol=2e-2)
    dout, dlse = (x[0, seen].float() for x in poisoned)
    channels = slice(3, 4) if "v" in what else slice(None)
    assert not dout[..., channels].isfinite().any()
    assert dlse.isfinite().all() if "v" in what else not dlse.isfinite().any()


def _halves(tensors):
    found = list(tensors.values())
    return found[:3], found[3:]


@DTYPES
@pytest.mark.parametrize("name", ["temporal", "windows"])
def test_queries_with_one_key(name, dtype):
    """Their result is its value, whatever the scores do."""
    q, k, v, dq, dk = torch.randn(5, 1, 5, 9, 2, 24).to(dtype)
    if name == "temporal":
        f, kwargs = vdcore.temporal_attention, {"mask": FrameMask.same_frame()}
    else:
        f, kwargs = vdcore.video_attention, {"mask": GridMask(FrameMask.same_frame(), 0, 0), "grid": (3, 3)}
    dout, dlse = pushed(lambda q, k, **how: f(q, k, v, **how), (q, k), (dq, dk), **kwargs)
    moved = (dq.double() * k.double() + q.double() * dk.double()).sum(-1) / 24**0.5
    torch.testing.assert_close(dlse.double(), moved, rtol=1e-5, atol=1e-5)
    assert dout.abs().max() < 1e-5 * moved.abs().max()


@pytest.mark.parametrize(
    "name,dtype",
    [
        *((name, torch.float32) for name in (*HIDING, "spatial")),
        *((n, torch.bfloat16) for n in ("temporal", "spatial")),
    ],
    ids=str,
)
def test_values_with_a_mean(name, dtype):
    """Of tangents of q and k nothing of the values' mean is left, however large: rows of P (E - dlse) add up to 0.

    In bfloat16 where all keys of a query are at hand: else forward's result, which was rounded, takes it out.
    """
    f, kwargs = HIDING.get(name) or (vdcore.spatial_attention, {})
    q, k, v, dq, dk = torch.randn(5, 1, 6, 9, 2, 24)
    v = 64 + v.bfloat16() / 4
    q, k, v, dq, dk = (x.to(dtype) for x in (q, k, v, dq, dk))
    found, _ = pushed(lambda q, k, **how: f(q, k, v, **how), (q, k), (dq, dk), **kwargs)
    doubles = [x.double() for x in (q, k, v - 64, dq, dk)]
    exact, _ = pushed(lambda q, k, **how: f(q, k, doubles[2], **how), doubles[:2], doubles[3:], **kwargs)
    assert (found.double() - exact).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-4) * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_frame_behind_a_sharp_norm(dtype):
    """Its value's tangent is the result's, though scores of q and k rounded after the norm are not forward's."""
    q, k, v, dv = torch.randn(4, 1, 1, 40, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = QKNorm(torch.full((64,), 4.0), torch.full((64,), 4.0))
    f = lambda v, **how: vdcore.temporal_attention(q, k, v, norm=norm, backend="cpu", **how)  # noqa: E731
    dout, _ = pushed(f, (v,), (dv,))
    torch.testing.assert_close(dout, dv, rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize("T", [3, 8, 70])
@pytest.mark.parametrize("norms", [(False, False), (True, False), (False, True)])
def test_of_a_gate_alone(norms, T, dtype):
    """No part moves: what is left is the difference of the parts."""
    q, k, v = torch.randn(3, 1, T, 17, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = tuple(QKNorm(None, None) if there else None for there in norms)
    gate = torch.rand(2, 1).to(dtype)
    s, t = vdcore.spatial_attention(q, k, v, norm=norm[0]), vdcore.temporal_attention(q, k, v, norm=norm[1])
    f = lambda gate: vdcore.gated_attention((q, k, v), (q, k, v), gate, norm=norm, backend="cpu")  # noqa: E731
    for _ in range(3):  # scratch memory holds what was there before
        _, dout = torch.func.jvp(f, (gate,), (torch.ones_like(gate),))
        torch.testing.assert_close(dout.float(), s.float() - t.float(), rtol=2e-2, atol=2e-2)


@DTYPES
@pytest.mark.parametrize("T", [3, 17, 70])
def test_a_row_of_which_a_bias_hides_all_moves_nothing(T, dtype):
    q, k, v, dq = torch.randn(4, 1, T, 2, 1, 16).to(dtype)
    bias, dbias = torch.zeros(1, T, T), torch.randn(1, T, T)
    bias[:, 1] = -torch.inf
    f = lambda q, bias, **how: vdcore.temporal_attention(q, k, v, bias=bias, backend="cpu", **how)  # noqa: E731
    dout, dlse = pushed(f, (q, bias), (dq, dbias))
    assert not dout[:, 1].any() and not dlse[:, 1].any()
    assert dlse[:, 2:].all()
