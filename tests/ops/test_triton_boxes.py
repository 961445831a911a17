"""Windows and listed tiles on Triton: the tables that its kernels walk through, and paths that no case takes."""

import pytest
import torch
from support import backends_of, check

import vdcore
from vdcore import FrameMask, GridMask, TileLists
from vdcore.ops.tile_attention.boxes import tiles_of
from vdcore.testing import Case

pytestmark = pytest.mark.skipif("triton" not in backends_of("temporal_attention"), reason="needs triton")

CPU = torch.device("cpu")
MASKS = [
    GridMask.window(2, 0, 1, (2, 1, 0)),
    GridMask.neighborhood((3, 3, 5)),
    GridMask.neighborhood((5, 1, 3), causal=True),
    GridMask.tiles((3, 1, 3), (2, 2, 3)),
    GridMask.radial(5, 7, frames=8),
    GridMask(FrameMask(past=1, future=1, chunk=2, sink=1), (2, 0), None, (2, 2, 3), "shift", sink=1),
    GridMask(FrameMask(past=1, future=1, chunk=3), 1, 1, (3, 1, 2), "clip", "shift", 2),
    GridMask(FrameMask.teacher_forcing(9, chunk=2), (2, 1, 0), (1, 0)),
    GridMask(FrameMask(past=1, future=0, shots=(0, 2)), 1),
]


# ---- Tables ----


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_windows_are_walked_through_once(mask, of_keys):
    """Every visible pair in one walked box; those without a test are visible as a whole; either kind goes by frames."""
    from vdcore_kernels.tile_attention import plan

    for T, rows, columns in ((3, 5, 7), (5, 3, 4), (1, 6, 9), (7, 2, 1)):
        for T_k, q_start in ((T, 0), (7, 2), (2, 0), (3, 6)):
            sizes = {"of_keys": of_keys, "held": 16, "walked": 8, "device": CPU}
            boxes = plan.windows(mask, (rows, columns), T, T_k, q_start, **sizes)
            seen = mask.visible(T, rows, columns, T_k, q_start).view(T, rows, columns, T_k, rows, columns)
            seen = seen.permute(3, 4, 5, 0, 1, 2) if of_keys else seen
            times = torch.zeros(seen.shape, dtype=torch.int32)
            _, height, width = boxes.walked_box
            held = torch.zeros(seen.shape[:3], dtype=torch.int32)
            for frame, first, extent, begin, tested, end, _, _ in boxes.held.tolist():
                (y, x), h, w = divmod(first, columns), extent >> 8 & 255, extent >> 16
                mine = (frame, slice(y, y + h), slice(x, x + w))
                held[mine] += 1
                order = []
                for i in range(begin, end):
                    other, place, _, _ = boxes.walked[i].tolist()
                    y, x = divmod(place, columns)
                    theirs = (other, slice(y, y + height), slice(x, x + width))
                    part = seen[mine][(..., *theirs)]
                    assert i >= tested or (part.shape[2:] == (height, width) and part.all())
                    times[mine][(..., *theirs)] += 1
                    order.append((i >= tested, other))
                assert order == sorted(order)
            assert held.eq(1).all() and (times <= 1).all() and times[seen].all()


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 3, 4), (3, 5, 7), (9, 9, 9), (1, 4, 8)])
def test_tiles_are_made_of_boxes(tile):
    from vdcore_kernels.tile_attention import plan

    T, grid = 4, (9, 11)
    boxes = plan.tiles(T, grid, tile, held=16, walked=8, device=CPU)
    for table, parts, n in ((boxes.held, boxes.parts[0], 16), (boxes.walked, boxes.parts[1], 8)):
        assert len(table) == tiles_of(T, grid, tile) * parts
        owner = torch.full((T, *grid), -1)
        for i, (frame, first, extent, *_) in enumerate(table.tolist()):
            y, x = divmod(first, grid[1])
            t, h, w = extent & 255, extent >> 8 & 255, extent >> 16
            assert t * h * w <= n
            mine = owner[frame : frame + t, y : y + h, x : x + w]
            assert mine.eq(-1).all()
            mine.fill_(i // parts)
        place = torch.stack(torch.meshgrid(*(torch.arange(s) // d for s, d in zip((T, *grid), tile)), indexing="ij"))
        across = [-(-s // d) for s, d in zip((T, *grid), tile)]
        assert torch.equal(owner, (place[0] * across[1] + place[1]) * across[2] + place[2])


def test_two_grids_of_one_length():
    """Nothing is kept by length: hazard 26."""
    q, k, v = torch.randn(3, 1, 2, 24, 1, 16)
    mask = GridMask.neighborhood((3, 3, 3))
    for _ in range(2):
        for grid in ((4, 6), (6, 4)):
            found = vdcore.video_attention(q, k, v, mask=mask, grid=grid, backend="triton")
            torch.testing.assert_close(found, vdcore.video_attention(q, k, v, mask=mask, grid=grid, backend="cpu"))


# ---- Paths that no case takes ----


def qkv(d, *shape, G=None):
    B, T, S, H, D = shape
    return {"q": d("q", *shape), "k": d("k", B, T, S, G or H, D), "v": d("v", B, T, S, G or H, D)}


def listed(d, H, n, *counts):
    """Lists of the first so many tiles, every other one."""
    K = max(counts)
    indices = (torch.arange(K) * 2 % n).sort().values.expand(1, H, n, K)
    many = torch.tensor(counts).repeat(n)[:n].expand(1, H, n)
    return TileLists(indices.to(torch.int32).contiguous(), many.to(torch.int32).contiguous())


PATHS = {
    # Boxes that all of a box's queries see, in frames of several boxes.
    "windows of whole tiles": (
        "video_attention",
        lambda d: {**qkv(d, 1, 2, 96, 1, 16), "mask": GridMask.tiles((1, 1, 3), (1, 4, 8)), "grid": (4, 24)},
    ),
    "a scale below zero": (
        "video_attention",
        lambda d: {**qkv(d, 1, 2, 15, 1, 16), "mask": GridMask(rows=1), "grid": (3, 5), "scale": -0.3},
    ),
    # Every place of a box is a token: nothing is masked.
    "tiles of whole boxes": (
        "tile_attention",
        lambda d: {
            **qkv(d, 1, 2, 64, 2, 16, G=1),
            "tiles": listed(d, 2, 4, 2, 0, 1),
            "tile": (1, 4, 8),
            "grid": (8, 8),
            "return_lse": True,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_paths(name):
    op, build = PATHS[name]
    check(Case(op, name, build), "triton")


def test_gradients_that_are_not_finite_stay_with_those_who_see():
    """NaN in dout of one query reaches the keys that it sees, not their neighbors in a box: bit for bit."""
    mask, grid, bad = GridMask.neighborhood((1, 3, 3)), (4, 5), 7
    q, k, v = (torch.randn(1, 1, 20, 1, 16, requires_grad=True) for _ in range(3))
    incoming = torch.randn(1, 1, 20, 1, 16)
    results = []
    for filler in (None, torch.nan):
        dout = incoming.clone()
        if filler is not None:
            dout[0, 0, bad, 0, 3] = filler
        out = vdcore.video_attention(q, k, v, mask=mask, grid=grid, backend="triton")
        results.append(torch.autograd.grad(out, (k, v), dout))
    seen = mask.visible(1, *grid)[bad]
    for clean, poisoned in zip(*results):
        assert poisoned[0, 0, seen].isnan().any(-1).all()
        assert torch.equal(poisoned[0, 0, ~seen], clean[0, 0, ~seen])
