"""Cases of attention to listed tiles, and PyTorch's form of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.alternatives import Choice, Sizes, draw_qkv, space
from vdcore.ops.cases import Attend, case, dense, with_each
from vdcore.ops.tile_attention.boxes import tiles_of, tokens_of
from vdcore.tile_lists import TileLists

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw

Box = tuple[int, int, int]


def draw_lists(d: Draw, B: int, H: int, n: int, K: int, *, empty: bool = False) -> TileLists:
    """Random lists of 1 to K tiles, or 0 to K; what comes after the count is out of range."""
    K = min(K, n)
    chosen = torch.rand(B, H, n, n, generator=d.generator).argsort(-1)[..., :K]
    counts = torch.randint(0 if empty else 1, K + 1, (B, H, n), generator=d.generator)
    chosen = torch.where(torch.arange(K) < counts[..., None], chosen, n).sort(-1).values
    return TileLists(chosen.to(torch.int32).to(d.device), counts.to(torch.int32).to(d.device))


def _args(
    d: Draw, sizes: tuple[int, ...], grid: tuple[int, int], tile: Box, K: int, lists: tuple[int, int], **kw: Any
) -> dict[str, Any]:
    """sizes: B, T, heads, channels, key heads."""
    B, T, H, D, G = sizes
    qkv = d.qkv(B, T, grid[0] * grid[1], H, D, G=G)
    return {**qkv, "tiles": draw_lists(d, *lists, tiles_of(T, grid, tile), K, **kw), "tile": tile, "grid": grid}


@case("tile_attention", "plain", "plain", "layout", "windows")
def _(d: Draw) -> dict[str, Any]:
    return _args(d, (2, 3, 3, 40, 3), (4, 6), (1, 2, 3), 4, (2, 3))


@case("tile_attention", "ragged tiles, some see nothing", "layout", "windows")
def _(d: Draw) -> dict[str, Any]:
    return {**_args(d, (2, 5, 2, 16, 2), (3, 5), (2, 2, 3), 5, (1, 2), empty=True), "return_lse": True}


@case("tile_attention", "grouped heads, one list for all", "windows")
def _(d: Draw) -> dict[str, Any]:
    return {**_args(d, (2, 3, 4, 24, 2), (3, 5), (4, 1, 2), 3, (1, 1)), "scale": 0.3}


@case("tile_attention", "tiles beyond a vector", "windows", "long")
def _(d: Draw) -> dict[str, Any]:
    return _args(d, (1, 4, 1, 72, 1), (9, 11), (2, 5, 7), 5, (1, 1))


def tile_form(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: TileLists,
    *,
    tile: Box,
    grid: tuple[int, int],
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    B, T, S, H, D = q.shape
    place = torch.zeros(T * S, dtype=torch.int64)
    for n, some in enumerate(tokens_of(T, grid, tile)):
        place[some] = n
    among = torch.zeros(*tiles.indices.shape[:3], tiles.indices.shape[2] + 1, dtype=torch.bool)
    there = torch.arange(tiles.indices.shape[3]) < tiles.counts.cpu()[..., None]
    among.scatter_(-1, torch.where(there, tiles.indices.cpu(), among.shape[3] - 1).long(), True)
    seen = among[..., place, :][..., place].expand(-1, H if tiles.indices.shape[1] > 1 else -1, -1, -1).to(q.device)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    out, lse = dense(attend, q, k, v, seen, D**-0.5 if scale is None else scale, return_lse)
    out = out.unflatten(1, (T, S))
    return (out, lse.unflatten(1, (T, S))) if lse is not None else out


# ---- How it may be called ----


@space(
    "tile_attention",
    heads=("equal", "grouped"),
    tile=((1, 1, 1), (2, 1, 2), (1, 2, 3), (9, 9, 9)),
    lists=("each", "heads", "batch", "one"),
    tiles=(1, 3, 100),
    empty=(False, True),
    scale=(None, 0.3, -0.2),
    return_lse=(False, True),
)
def _tiles(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    tensors, _, _ = draw_qkv(d, {**c, "keys": "same"}, n)
    rows = max(i for i in range(1, n.S + 1) if n.S % i == 0 and i * i <= n.S)
    grid = rows, n.S // rows
    B, H = (n.B if c["lists"] in ("each", "batch") else 1), (n.H if c["lists"] in ("each", "heads") else 1)
    lists = draw_lists(d, B, H, tiles_of(n.T, grid, c["tile"]), c["tiles"], empty=c["empty"])
    more = {"scale": c["scale"], "return_lse": c["return_lse"]}
    return {**tensors, "tiles": lists, "tile": c["tile"], "grid": grid, **more}


FORMS = {"tile_attention": with_each(tile_form)}
