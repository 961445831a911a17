"""Hazards 8 and 9: a zero in any dimension is an empty or a zero result, forward and backward, never a crash."""

import pytest
import torch
from support import backends_of, dtype_of

import vdcore
from vdcore import GridMask, QKNorm, Rope, TileLists

QKV = {"B": 2, "T": 3, "S": 4, "H": 2, "D": 8}


def attention(op, sizes, dtype):
    shape = tuple(sizes.values())
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    D, T = sizes["D"], sizes["T"]
    weight = torch.ones(D, requires_grad=True)
    angle = torch.randn(T, 1, D // 2)
    extra = {"norm": QKNorm(weight, weight), "rope": Rope(angle.cos(), angle.sin())}
    if op == "gated_attention":
        gate = torch.tensor(0.5, requires_grad=True)
        return {"spatial": (q, k, v), "temporal": (q, k, v), "gate": gate}, [q, k, v, gate]
    if op == "cross_attention":
        text = torch.randn(sizes["B"], 5, sizes["H"], D, dtype=dtype, requires_grad=True)
        return {"q": q, "k": text, "v": text}, [q, text]
    if op == "tile_attention":
        n = -(-T // 2) * -(-sizes["S"] // 3)
        lists = TileLists(torch.zeros(1, 1, n, 2, dtype=torch.int32), torch.ones(1, 1, n, dtype=torch.int32))
        return {"q": q, "k": k, "v": v, "tiles": lists, "tile": (2, 1, 3), "grid": (1, sizes["S"])}, [q, k, v]
    if op == "qk_norm_rope":
        return {"q": q, "k": k, **extra}, [q, k, weight]
    return {"q": q, "k": k, "v": v, **extra}, [q, k, v, weight]


ATTENTION = [
    "temporal_attention",
    "spatial_attention",
    "video_attention",
    "gated_attention",
    "cross_attention",
    "tile_attention",
    "qk_norm_rope",
]


def run_and_differentiate(op, args, leaves, backend):
    result = getattr(vdcore, op)(**args, backend=backend)
    outputs = result if isinstance(result, tuple) else (result,)
    sum(y.sum() for y in outputs).backward()
    for x in leaves:
        assert x.grad is not None and x.grad.shape == x.shape
        assert not x.grad.isnan().any()
    return outputs


@pytest.mark.parametrize("axis", list(QKV))
@pytest.mark.parametrize("op,backend", [(op, b) for op in ATTENTION for b in ["auto", *backends_of(op)] if b != "sdpa"])
def test_attention(op, backend, axis):
    args, leaves = attention(op, {**QKV, axis: 0}, dtype_of(backend))
    (out, *_) = run_and_differentiate(op, args, leaves, backend)
    assert out.shape == leaves[0].shape


@pytest.mark.parametrize("axis", list(QKV))
def test_windows(axis):
    sizes = {**QKV, axis: 0}
    args, leaves = attention("video_attention", sizes, torch.float32)
    H = sizes["H"]
    for mask in (GridMask.neighborhood((3, 1, 3)), ((H // 2, GridMask.radial(2, 2)), (H - H // 2, GridMask(rows=0)))):
        grid = (2, sizes["S"] // 2)
        (out,) = run_and_differentiate("video_attention", {**args, "mask": mask, "grid": grid}, leaves, "auto")
        assert out.shape == leaves[0].shape


@pytest.mark.parametrize("op", ["temporal_attention", "video_attention"])
def test_no_keys(op):
    """Queries with no key frame at all: output 0, lse -inf, gradient 0."""
    for backend in ["auto", *(b for b in backends_of(op) if b != "sdpa")]:
        q = torch.randn(2, 3, 4, 2, 8, dtype=dtype_of(backend), requires_grad=True)
        k, v = (torch.randn(2, 0, 4, 2, 8, dtype=dtype_of(backend), requires_grad=True) for _ in range(2))
        out, lse = getattr(vdcore, op)(q, k, v, return_lse=True, backend=backend)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
        out.sum().backward()
        assert q.grad.eq(0).all() and k.grad.shape == k.shape


@pytest.mark.parametrize("backend", ["auto", *(b for b in backends_of("cross_attention") if b != "sdpa")])
def test_no_text(backend):
    q = torch.randn(2, 3, 4, 2, 8, requires_grad=True)
    text = torch.randn(2, 0, 2, 8, requires_grad=True)
    out, lse = vdcore.cross_attention(q, text, text, return_lse=True, backend=backend)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    out.sum().backward()
    assert q.grad.eq(0).all()


@pytest.mark.parametrize("backend", ["auto", *(b for b in backends_of("video_attention") if b != "sdpa")])
def test_text_of_no_tokens_is_no_text(backend):
    q, k, v = (torch.randn(1, 2, 3, 2, 8) for _ in range(3))
    text = tuple(torch.randn(1, 0, 2, 8) for _ in range(3))
    out, out_text = vdcore.video_attention(q, k, v, text=text, backend=backend)
    torch.testing.assert_close(out, vdcore.video_attention(q, k, v, backend="reference"))
    assert out_text.shape == (1, 0, 2, 8)
    weight = torch.ones(8, requires_grad=True)
    out, _ = vdcore.video_attention(q, k, v, text=text, text_norm=QKNorm(weight, weight), backend=backend)
    out.sum().backward()
    assert weight.grad.eq(0).all()


def test_a_rope_of_no_pairs_rotates_nothing():
    q = torch.randn(1, 4, 3, 2, 8)
    rope = Rope(torch.ones(4, 1, 0), torch.ones(4, 1, 0))
    for backend in ["auto", *(b for b in backends_of("temporal_attention") if dtype_of(b) == q.dtype)]:
        out = vdcore.temporal_attention(q, q, q, rope=rope, backend=backend)
        torch.testing.assert_close(out, vdcore.temporal_attention(q, q, q, backend=backend))


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("backend", ["auto", *backends_of("patchify")])
def test_patchify(backend, axis):
    shape = [2, 3, 2, 4, 6]
    shape[axis] = 0
    video = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(5, shape[1], 1, 2, 2, requires_grad=True), torch.randn(5, requires_grad=True)
    (out,) = run_and_differentiate(
        "patchify", {"video": video, "weight": weight, "bias": bias}, [video, weight, bias], backend
    )
    assert out.shape == (shape[0], shape[2], shape[3] // 2 * (shape[4] // 2), 5)
    if axis == 1:  # no channels: the bias alone
        torch.testing.assert_close(out, bias.expand(out.shape))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("op", ["modulate", "gate_residual"])
def test_adaln(op, axis):
    shape = [2, 3, 4, 8]
    shape[axis] = 0
    x, y = (torch.randn(shape, requires_grad=True) for _ in range(2))
    a, b = (torch.randn(shape[0], shape[3], requires_grad=True) for _ in range(2))
    args = {"x": x, "shift": a, "scale": b} if op == "modulate" else {"residual": x, "x": y, "gate": a}
    for backend in ["auto", *backends_of(op)]:
        (out,) = run_and_differentiate(op, args, [x, a], backend)
        assert out.shape == x.shape


def test_unpatchify():
    for tokens, grid in (((0, 2, 6, 5), (2, 2, 3)), ((1, 0, 6, 5), (0, 2, 3)), ((1, 2, 0, 5), (2, 0, 3))):
        x = torch.randn(tokens, requires_grad=True)
        weight = torch.randn(12, 5, requires_grad=True)
        for backend in ["auto", *backends_of("unpatchify")]:
            args = {"tokens": x, "weight": weight, "channels": 3, "patch": (1, 2, 2), "grid": grid}
            (out,) = run_and_differentiate("unpatchify", args, [x, weight], backend)
            assert out.shape == (tokens[0], 3, grid[0], grid[1] * 2, grid[2] * 2)
