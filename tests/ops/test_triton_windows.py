"""Windows and listed tiles on Triton's interpreter, as a whole: compiled graphs, equal bits, hidden NaN, borders."""

import pytest
import torch
from support import backends_of, check

import vdcore
from vdcore import FrameMask, GridMask
from vdcore.ops.choose import BackendError
from vdcore.ops.operator import capture
from vdcore.testing import CASES, Case, run

pytestmark = pytest.mark.skipif("triton" not in backends_of("tile_attention"), reason="needs triton")

WINDOWS = [case for case in CASES if "windows" in case.tags]
FEW = [case for case in WINDOWS if case.name in ("neighborhood", "ragged tiles, some see nothing")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_cases(case, dtype):
    """All of them in float16, too: grouped heads, masks by head, text, lengths, caches, what is beyond a box."""
    check(case, "triton", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_two_runs_have_equal_bits(case):
    inputs = case.inputs(torch.float32, requires_grad=True)
    first, second = (run(inputs, getattr(vdcore, case.op), backend="triton").named() for _ in range(2))
    assert all(torch.equal(x.view(torch.int32), second[name].view(torch.int32)) for name, x in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=str)
def test_opcheck(case):
    inputs = case.inputs(torch.float32, requires_grad=True, layout="packed")
    call = capture(getattr(vdcore, case.op), **inputs.args)
    arguments = (*call.tensors(), *call.numbers(), True, "triton")
    torch.library.opcheck(getattr(torch.ops.vdcore, case.op).default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=str)
def test_fullgraph(case):
    inputs = case.inputs(torch.float32, requires_grad=True, layout="heads_first")
    function = getattr(vdcore, case.op)

    def model(**args):
        with vdcore.use_backend("triton"):
            return function(**args)

    torch._dynamo.reset()
    eager = run(inputs, model)
    compiled = run(inputs, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(a.stride() == b.stride() for a, b in zip(compiled.outputs, eager.outputs))
    for name, x in compiled.named().items():
        torch.testing.assert_close(x, eager.named()[name], rtol=0, atol=0)


# ---- Borders ----


def qkv(d, *shape):
    return {name: d(name, *shape) for name in "qkv"}


BORDERS = {
    # A tile is cut to the grid before a window is counted in tokens.
    "a tile larger than the grid": GridMask.tiles((1, 1, 3), (1, 30_000, 2)),
    "a window larger than the grid": GridMask(FrameMask.causal(), rows=9_000, columns=(30_000, 1)),
}


@pytest.mark.parametrize("name", BORDERS)
def test_borders(name):
    def build(d):
        return {**qkv(d, 1, 2, 15, 1, 16), "mask": BORDERS[name], "grid": (3, 5)}

    check(Case("video_attention", name, build), "triton")


def test_long_axes_are_refused_by_name():
    q = torch.randn(1, 1, 2**13, 1, 16)
    given = {"q": q, "k": q, "v": q, "mask": GridMask(columns=1), "grid": (1, 2**13)}
    assert "less than 8192 rows and columns" in dict(vdcore.explain("video_attention", **given))["triton"]


# ---- Head dims ----


@pytest.mark.parametrize("op", ["video_attention", "tile_attention"])
def test_more_channels_than_windows_have_are_refused_by_name(op):
    """Dense attention has 256."""
    q = torch.randn(1, 1, 4, 1, 136)
    given = {"q": q, "k": q, "v": q, "grid": (2, 2)}
    if op == "video_attention":
        assert dict(vdcore.explain(op, q, q, q))["triton"] is None
        given["mask"] = GridMask(rows=1)
    else:
        given |= {"tiles": vdcore.select_tiles(q, q, tile=(1, 1, 1), grid=(2, 2), keep=1), "tile": (1, 1, 1)}
    reason = dict(vdcore.explain(op, **given))["triton"]
    assert reason == "head_dim of windows and tiles must be at most 128, got 136"
    with pytest.raises(BackendError, match="must be at most 128, got 136"):
        getattr(vdcore, op)(**given, backend="triton")


# ---- What hides ----


@pytest.mark.slow
@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["k", "v", "q", "dout"])
def test_what_is_not_finite_stays_with_those_who_see_it(name, filler):
    """Of one token: whoever does not see it, in the same boxes, gets the bits that it gets without."""
    mask, grid, bad = GridMask.neighborhood((1, 3, 3)), (4, 9), 13
    tensors = dict(zip(("q", "k", "v", "dout"), torch.randn(4, 1, 1, 36, 1, 24)))
    results = []
    for spoil in (False, True):
        x = {key: value.clone() for key, value in tensors.items()}
        if spoil:
            x[name][0, 0, bad, 0, 5] = filler
        leaves = [x[key].requires_grad_() for key in "qkv"]
        out = vdcore.video_attention(*leaves, mask=mask, grid=grid, backend="triton")
        results.append([y[0, 0].detach() for y in (out, *torch.autograd.grad(out, leaves, x["dout"]))])
    seen = mask.visible(1, *grid)
    queries = seen[:, bad] if name in "kv" else torch.arange(36) == bad  # whose rows of scores or of dout it is in
    keys = seen[queries].any(0)
    clean = (~queries, ~queries, ~keys, ~keys)
    for (good, spoiled), mine in zip(zip(*results), clean):
        assert torch.equal(good[mine], spoiled[mine])
    if name != "dout":
        assert not results[1][0][queries].isfinite().all()


# ---- AMD ----


@pytest.mark.parametrize("grid", [False, True])
def test_pointers_chosen_between_by_their_addresses_are_the_same(grid, monkeypatch):
    from vdcore_kernels.core import tokens

    def attention():
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, 2, 12, 2, 16, generator=generator).requires_grad_() for _ in range(3))
        text = tuple(torch.randn(1, 5, 2, 16, generator=generator).requires_grad_() for _ in range(3))
        more = {"mask": GridMask(rows=1), "grid": (3, 4)} if grid else {"mask": FrameMask.causal()}
        out = vdcore.video_attention(q, k, v, text=text, backend="triton", **more)
        return [*out, *torch.autograd.grad(out, (q, k, v, *text), [torch.ones_like(x) for x in out])]

    before = attention()
    calls = []
    monkeypatch.setattr(tokens, "is_amd", lambda x: calls.append(x) or True)
    assert all(torch.equal(x, y) for x, y in zip(before, attention())) and calls
