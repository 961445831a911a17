"""Hazard 11: nothing outside the visible runs reaches a result, not even as 0 * NaN; real NaN propagates."""

import pytest
import torch
from support import backends_of, dtype_of

import vdcore
from vdcore import FrameMask, GridMask, QKNorm, Rope, TileLists

FRAMES = [(op, b) for op in ("temporal_attention", "video_attention") for b in backends_of(op) if b != "sdpa"]


def run(op, q, k, v, backend, **kwargs):
    """Output, and gradients of q, k, v and of the norm's weights and the rope table, which all rows share."""
    D = q.shape[-1]
    shared = [torch.ones(D, requires_grad=True) for _ in range(2)]
    angle = torch.linspace(0, 1, D // 2).expand(12, 1, D // 2)
    table = [angle.cos().clone().requires_grad_(), angle.sin().clone().requires_grad_()]
    leaves = [x.detach().to(dtype_of(backend), copy=True).requires_grad_() for x in (q, k, v)]
    kwargs = {"norm": QKNorm(*shared), "rope": Rope(*table), **kwargs}
    out = getattr(vdcore, op)(*leaves, backend=backend, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    if (lengths := kwargs.get("lengths")) is not None:  # the gradient of a padded frame may be anything, too
        incoming[torch.arange(out.shape[1]) >= lengths[:, None]] = torch.nan
    return out.detach(), torch.autograd.grad(out, [*leaves, *shared, *table], incoming)


@pytest.mark.parametrize("op,backend", FRAMES)
def test_frames_past_the_lengths(op, backend):
    q, k, v = (torch.randn(2, 7, 3, 2, 16) for _ in range(3))
    lengths = torch.tensor([4, 6])
    expected = run(
        op,
        *(
            x.masked_fill(torch.arange(7)[None, :, None, None, None] >= lengths.view(2, 1, 1, 1, 1), 0.5)
            for x in (q, k, v)
        ),
        backend,
        lengths=lengths,
    )
    poisoned = [x.clone() for x in (q, k, v)]
    for x in poisoned:
        x[0, 4:] = torch.nan
        x[1, 6:] = torch.nan
    out, grads = run(op, *poisoned, backend, lengths=lengths)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=0)
    for ours, theirs in zip(grads, expected[1]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("op,backend", FRAMES)
@pytest.mark.parametrize(
    "mask", [FrameMask.causal(), FrameMask(past=1, future=0, sink=1), FrameMask(past=0, future=0, chunk=2)], ids=str
)
def test_hidden_frames(op, backend, name, mask):
    """NaN in one key frame reaches exactly the query frames that see it, and their gradients."""
    T, bad = 9, 4
    tensors = {n: torch.randn(1, T, 2, 2, 16) for n in "qkv"}
    clean, clean_grads = run(op, *tensors.values(), backend, mask=mask)
    tensors[name] = tensors[name].clone()
    tensors[name][0, bad] = torch.nan
    out, grads = run(op, *tensors.values(), backend, mask=mask)
    sees = mask.visible(T)[:, bad]
    assert out[0, sees].isnan().all(), "real NaN must propagate"
    torch.testing.assert_close(out[0, ~sees], clean[0, ~sees], rtol=0, atol=0)
    torch.testing.assert_close(grads[0][0, ~sees], clean_grads[0][0, ~sees], rtol=0, atol=0)
    # A key whose every viewer is clean keeps its gradient.
    touched = mask.visible(T)[sees].any(0)
    for i in (1, 2):
        torch.testing.assert_close(grads[i][0, ~touched], clean_grads[i][0, ~touched], rtol=0, atol=0)


@pytest.mark.parametrize("op,backend", FRAMES)
def test_lse_of_who_sees_it(op, backend):
    """NaN in a key reaches the lse of exactly the rows that see it."""
    T, bad = 6, 3
    q, k, v = (torch.randn(1, T, 5, 2, 16).to(dtype_of(backend)) for _ in range(3))
    k[0, bad] = torch.nan
    out, lse = getattr(vdcore, op)(q, k, v, mask=FrameMask.causal(), return_lse=True, backend=backend)
    assert lse[0, bad:].isnan().all() and out[0, bad:].isnan().all()
    assert lse[0, :bad].isfinite().all() and out[0, :bad].isfinite().all()


@pytest.mark.parametrize("backend", [b for b in backends_of("temporal_attention") if b != "sdpa"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_channel_of_a_value(backend, value):
    """Who sees it gets it, or becomes NaN as a whole; who does not see it is untouched."""
    T, bad = 7, 3
    q, k, v = (torch.randn(1, T, 2, 2, 16).to(dtype_of(backend)) for _ in range(3))
    clean = vdcore.temporal_attention(q, k, v, mask=FrameMask.causal(), backend=backend)
    v[0, bad, ..., 5] = value
    out = vdcore.temporal_attention(q, k, v, mask=FrameMask.causal(), backend=backend)
    assert not out[0, bad:, ..., 5].isfinite().any()
    torch.testing.assert_close(out[0, :bad], clean[0, :bad], rtol=0, atol=0)
    rest = [i for i in range(16) if i != 5]
    same = out[0, bad:][..., rest] == clean[0, bad:][..., rest]
    assert (same | out[0, bad:][..., rest].isnan()).all()


@pytest.mark.parametrize("mask", [FrameMask.causal(), FrameMask(past=5, future=0, sink=6)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_channel_of_a_value_reaches_all_blocks_of_queries(dtype, value, mask):
    """More frames than a kernel works on at once, 64 on the CPU; two heads of keys for four of queries."""
    T, bad = 130, 3
    q, k, v = (torch.randn(1, T, 2, heads, 16).to(dtype) for heads in (4, 2, 2))
    clean = vdcore.temporal_attention(q, k, v, mask=mask, backend="cpu")
    v[0, bad, 1, 0, 5] = value
    out = vdcore.temporal_attention(q, k, v, mask=mask, backend="cpu")
    hit = torch.zeros(out.shape, dtype=torch.bool)
    hit[0, mask.visible(T)[:, bad], 1, :2, 5] = True
    assert not out[hit].isfinite().any() and hit[0, 64:].any()
    torch.testing.assert_close(out[~hit], clean[~hit], rtol=2**-6, atol=2**-6)


WINDOWS = [GridMask.neighborhood((3, 3, 3)), GridMask.tiles((1, 3, 1), (2, 2, 1)), GridMask.window(1, 0, (1, 0), 1)]


def windows_run_on(backend):
    q = torch.randn(1, 5, 12, 2, 16, dtype=dtype_of(backend), requires_grad=True)
    return dict(vdcore.explain("video_attention", q, q, q, mask=WINDOWS[0], grid=(3, 4)))[backend] is None


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize(
    "backend,mask",
    [
        pytest.param(b, mask, marks=[pytest.mark.slow] if b == "triton" else [])
        for b in backends_of("video_attention")
        if windows_run_on(b)
        for mask in WINDOWS
    ],
    ids=str,
)
def test_hidden_tokens(backend, name, mask):
    """NaN and infinity in one key token reach exactly the queries that see it, and their gradients: bit for bit."""
    T, bad = 5, 2 * 20
    tensors = {n: torch.randn(1, T, 20, 2, 16) for n in "qkv"}
    clean, clean_grads = run("video_attention", *tensors.values(), backend, mask=mask, grid=(4, 5))
    sees = mask.visible(T, 4, 5)[:, bad].view(T, 20)
    touched = mask.visible(T, 4, 5)[sees.flatten()].any(0).view(T, 20)
    assert sees.any() and not sees.all() and not touched.all()
    for filler in (torch.nan, torch.inf):
        tensors[name] = tensors[name].clone()
        tensors[name].flatten(1, 2)[0, bad] = filler
        out, grads = run("video_attention", *tensors.values(), backend, mask=mask, grid=(4, 5))
        assert not out[0, sees].isfinite().any(-1).any() or filler == torch.inf, "real NaN must propagate"
        torch.testing.assert_close(out[0, ~sees], clean[0, ~sees], rtol=0, atol=0)
        torch.testing.assert_close(grads[0][0, ~sees], clean_grads[0][0, ~sees], rtol=0, atol=0)
        for i in (1, 2):
            torch.testing.assert_close(grads[i][0, ~touched], clean_grads[i][0, ~touched], rtol=0, atol=0)


@pytest.mark.parametrize("backend", backends_of("tile_attention"))
def test_tiles_that_nobody_lists(backend):
    """They may hold anything."""
    lists = TileLists(
        torch.tensor([[0, 2], [0, 9], [2, 2], [0, 2]]).int()[None, None], torch.tensor([[[2, 1, 0, 2]]]).int()
    )
    results = []
    qkv = [torch.randn(1, 4, 15, 2, 16).to(dtype_of(backend)) for _ in range(3)]
    for filler in (0.5, torch.nan):
        for x in qkv[1:]:
            x.unflatten(2, (3, 5))[:, :2, :, 3:] = filler  # tiles 1 and 3
            x.unflatten(2, (3, 5))[:, 2:, :, 3:] = filler
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = vdcore.tile_attention(*leaves, lists, tile=(2, 3, 3), grid=(3, 5), backend=backend)
        assert out.unflatten(2, (3, 5))[:, 2:, :, :3].eq(0).all()
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for clean, poisoned in zip(*results):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [b for b in backends_of("cross_attention") if b != "sdpa"])
def test_text_past_its_length(backend):
    q, k, v = torch.randn(2, 2, 3, 2, 16), torch.randn(2, 6, 2, 16), torch.randn(2, 6, 2, 16)
    lengths = torch.tensor([4, 1])
    results = []
    for filler in (0.5, torch.nan):
        for x in (k, v):
            x[0, 4:], x[1, 1:] = filler, filler
        weights = [torch.ones(16, requires_grad=True) for _ in range(2)]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = vdcore.cross_attention(*leaves, lengths=lengths, norm=QKNorm(*weights), backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, *weights])])
    for clean, poisoned in zip(*results):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [b for b in backends_of("video_attention") if b != "sdpa"])
@pytest.mark.parametrize("text_sees", ["all", "text"])
def test_joint_text_past_its_length(backend, text_sees):
    qkv = [torch.randn(2, 3, 4, 2, 16) for _ in range(3)]
    text = [torch.randn(2, 5, 2, 16) for _ in range(3)]
    results = []
    for filler in (0.5, torch.nan):
        for x in text:
            x[0, 3:], x[1, 0:] = filler, filler
        weights = [torch.ones(16, requires_grad=True) for _ in range(2)]
        leaves = [x.clone().requires_grad_() for x in (*qkv, *text)]
        out, out_text = vdcore.video_attention(
            *leaves[:3],
            text=tuple(leaves[3:]),
            text_lengths=torch.tensor([3, 0]),
            text_norm=QKNorm(*weights),
            text_sees=text_sees,
            mask=FrameMask.causal(),
            backend=backend,
        )
        assert out_text[0, 3:].eq(0).all() and out_text[1].eq(0).all()
        total = out.square().sum() + out_text.square().sum()
        results.append([out.detach(), out_text.detach(), *torch.autograd.grad(total, [*leaves, *weights])])
    for clean, poisoned in zip(*results):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@pytest.mark.parametrize("backend", backends_of("gated_attention"))
def test_gated_frames_past_the_lengths(backend):
    qkv = [torch.randn(1, 5, 3, 2, 16) for _ in range(3)]
    results = []
    for filler in (0.5, torch.nan):
        for x in qkv:
            x[0, 3:] = filler
        leaves = [x.clone().requires_grad_() for x in qkv]
        gate = torch.full((16,), 0.3, requires_grad=True)
        out = vdcore.gated_attention(leaves, leaves, gate, lengths=torch.tensor([3]), backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, gate])])
    for clean, poisoned in zip(*results):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
