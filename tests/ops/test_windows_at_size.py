"""Windows and tiles on grids that nothing divides, with many boxes a frame, against attention under the dense mask."""

import pytest
import torch
from support import backends_of

import vdcore
from vdcore import FrameMask, GridMask
from vdcore.ops.tile_attention.boxes import tokens_of
from vdcore.testing.tolerance import error_ratio

MASKS = {
    "neighborhood": lambda T, R, C: GridMask.neighborhood((3, 7, 11)),
    "causal": lambda T, R, C: GridMask.neighborhood((3, 5, 9), causal=True),
    "tiles": lambda T, R, C: GridMask.tiles((3, 3, 3), (2, 4, 6)),
    "radial": lambda T, R, C: GridMask.radial(R, C),
    "bands": lambda T, R, C: GridMask(FrameMask(past=2, future=1, sink=1), rows=(6, 2), tile=(1, 2, 1)),
}
SMALL = [(3, 5, 7), (4, 13, 22), (2, 9, 31)]
LARGE = [(5, 30, 53), (13, 22, 40)]


def dense(q, k, v, seen):
    """Scores of all pairs in q's dtype, a head after another: ``(n, H, D)`` of ``(n, H, D)``."""
    heads = [
        (q[:, h] @ k[:, h].mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, h]
        for h in range(q.shape[1])
    ]
    return torch.stack(heads, 1)


def compare(seen, call, n, dtype, H=1, D=40, gradients=True):
    """Outputs and gradients against float64's, by what the same form errs by in float32; seen: of the last queries."""
    generator = torch.Generator().manual_seed(n)
    drawn = [torch.randn(n, H, D, generator=generator).to(dtype) for _ in range(4)]

    def run(function, to):
        leaves = [x.to(to).requires_grad_(gradients) for x in drawn[:3]]
        out = function(*leaves)
        incoming = drawn[3][-len(seen) :].to(to)
        return [out.detach(), *(torch.autograd.grad(out, leaves, incoming) if gradients else ())]

    def form(q, k, v):
        return dense(q[-len(seen) :], k, v, seen)

    exact, torchs, ours = run(form, torch.float64), run(form, dtype), run(call, dtype)
    for i, (x, y, theirs) in enumerate(zip(ours, exact, torchs)):
        assert error_ratio(x, y, [theirs], gradient=i > 0).worst <= 1, i


def windows(mask, sizes, dtype, backend="cpu", frames=None, **kwargs):
    """frames: the queries are those of so many last ones."""
    T, R, C = sizes
    start = 0 if frames is None else T - frames

    def call(*qkv):
        q, k, v = (x.unflatten(0, (1, T, R * C)) for x in qkv)
        given = {"mask": mask, "grid": (R, C), "q_start": start, "backend": backend}
        return vdcore.video_attention(q[:, start:], k, v, **given).flatten(0, 2)

    compare(mask.visible(T - start, R, C, T, start), call, T * R * C, dtype, **kwargs)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_windows(sizes, name):
    windows(MASKS[name](*sizes), sizes, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_windows(sizes, name, dtype):
    windows(MASKS[name](*sizes), sizes, dtype, gradients=sizes == LARGE[0])


def tiles(tile, sizes, dtype, backend="cpu", keep=0.4, **kwargs):
    T, R, C = sizes
    n = T * R * C
    tokens = tokens_of(T, (R, C), tile)
    q, k = torch.randn(2, 1, T, R * C, 1, 40)
    lists = vdcore.select_tiles(q, k, tile=tile, grid=(R, C), keep=keep)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for mine, row, count in zip(tokens, lists.indices[0, 0].tolist(), lists.counts[0, 0].tolist()):
        for other in row[:count]:
            seen[mine[:, None], tokens[other]] = True

    def call(*qkv):
        q, k, v = (x.unflatten(0, (1, T, R * C)) for x in qkv)
        return vdcore.tile_attention(q, k, v, lists, tile=tile, grid=(R, C), backend=backend).flatten(0, 2)

    compare(seen, call, n, dtype, **kwargs)


@pytest.mark.parametrize("tile", [(2, 4, 6), (3, 8, 8), (1, 1, 5)], ids=str)
def test_tiles(tile):
    tiles(tile, (4, 13, 22), torch.float32)


# ---- The same by Triton's interpreter: one to three minutes each ----

INTERPRETED = pytest.mark.skipif("triton" not in backends_of("tile_attention"), reason="needs triton")
HALF = {"tiles", "radial"}  # are tried in float16, the others in float32


def hopper_boxes():
    """With the boxes that sm_90 takes: the interpreter's own are for small cases."""
    from vdcore_kernels.core.launch import force, pick
    from vdcore_kernels.tile_attention.backward_keys import KEYS
    from vdcore_kernels.tile_attention.backward_queries import QUERIES
    from vdcore_kernels.tile_attention.forward import FORWARD

    return force(*(pick(table, "sm_90") for table in (FORWARD, QUERIES, KEYS)))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_windows_on_triton(sizes, name):
    dtype = torch.float16 if name in HALF else torch.float32
    frames = None if name == "neighborhood" and sizes == LARGE[0] else 1  # all queries once
    with hopper_boxes():
        windows(MASKS[name](*sizes), sizes, dtype, "triton", frames, D=16)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_tiles_on_triton(sizes, dtype):
    with hopper_boxes():
        tiles((2, 4, 6), sizes, dtype, "triton", keep=8, D=16)
