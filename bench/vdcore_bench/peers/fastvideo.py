"""FastVideo's sliding tile attention: tiles of (6, 8, 8) tokens, which are brought together and put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore import FrameMask, GridMask
from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Makers, norm_rope
from vdcore_bench.peers.registry import library, peer

MODULE, TILE = "fastvideo_kernel", (6, 8, 8)
SHAPES = ((30, 48, 80), (36, 48, 48), (18, 48, 80))  # frames, rows and columns that it is compiled for


def _window(job: Job) -> tuple[int, int, int] | None:
    """The window in tiles that a mask is in its terms; a dense mask is a window of everything."""
    mask, s = job.grid_mask, job.shape
    tiles = tuple(-(-n // size) for n, size in zip((s.T, s.rows, s.columns), TILE))
    if mask is None:
        return (tiles[0], tiles[1], tiles[2]) if job.mask == FrameMask.full() else None
    if mask.frames.past is None or not isinstance(mask.rows, int) or not isinstance(mask.columns, int):
        return None
    size = 2 * mask.frames.past + 1, 2 * mask.rows + 1, 2 * mask.columns + 1
    return size if mask == GridMask.tiles(size, TILE) else None


def _why_not(job: Job) -> str | None:
    reason = library(MODULE, backward=False)(job)
    if reason is not None:
        return reason
    s = job.shape
    if (s.T, s.rows, s.columns) not in SHAPES:
        shapes = ", ".join("x".join(map(str, shape)) for shape in SHAPES)
        return f"it takes videos of {shapes} tokens only"
    if _window(job) is None or s.G != s.H:
        return "its windows are those of GridMask.tiles with tiles of (6, 8, 8), without grouped heads"
    return None


@peer("sta", ("video_attention",), why_not=_why_not, module=MODULE)
def sliding_tiles(job: Job) -> Makers:
    from fastvideo_kernel import sliding_tile_attention

    s, window = job.shape, _window(job)
    shape = f"{s.T}x{s.rows}x{s.columns}"
    split = [size for n, tile in zip((s.T, s.rows, s.columns), TILE) for size in (n // tile, tile)]

    def gather(x: Tensor) -> Tensor:
        """``(B, T, S, H, D)`` to ``(B, H, N, D)``, tile by tile."""
        x = x.reshape(s.B, *split, s.H, s.D)
        return x.permute(0, 7, 1, 3, 5, 2, 4, 6, 8).reshape(s.B, s.H, -1, s.D)

    def scatter(x: Tensor) -> Tensor:
        x = x.view(s.B, s.H, *split[::2], *TILE, s.D)
        return x.permute(0, 2, 5, 3, 6, 4, 7, 1, 8).reshape(s.B, s.T, s.S, s.H, s.D)

    def attention(
        q: Tensor, k: Any = None, v: Any = None, *, norm: Any = None, rope: Any = None, **rest: Any
    ) -> Tensor:
        q, k, v = (q, k, v) if k is not None else q.unbind(3)
        q, k = norm_rope(q, k, norm, rope)
        q, k, v = (gather(x) for x in (q, k, v))
        return scatter(sliding_tile_attention(q, k, v, [window] * s.H, 0, False, shape))

    return {"tiles gathered and put back": lambda: attention}


def _not_by_mask(job: Job) -> str | None:
    return library(MODULE)(job) or "its tiles are chosen from queries and keys, and no mask says which"


@peer("vsa", ("video_attention",), why_not=_not_by_mask, module=MODULE)
def chosen_tiles(job: Job) -> Makers:
    return {}
