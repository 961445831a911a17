"""Attention of tiles of tokens, boxes of frames, rows and columns, to listed tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.ops import check
from vdcore.ops.call import Call, empty, empty_like, lse_dtype
from vdcore.ops.choose import Implementation
from vdcore.ops.frame_attention import video_attention
from vdcore.ops.operator import by_formula, register, run
from vdcore.ops.tile_attention import cpu, cpu_tangents, reference, triton
from vdcore.ops.tile_attention.boxes import check_tiles, tiles_of
from vdcore.ops.tile_attention.lists import checked, select_tiles
from vdcore.tile_lists import TileLists

__all__ = ["TileCall", "kept_mass", "select_tiles", "tile_attention"]


@dataclass
class TileCall(Call):
    """q ``(B, T, S, H, D)``, k and v ``(B, T, S, G, D)``, indices ``(B or 1, H or 1, n, K)``, counts without K."""

    op: ClassVar[str] = "tile_attention"
    OUTPUTS: ClassVar[int] = 2
    SAVES_OUTPUTS: ClassVar[bool] = True

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    tile: tuple[int, int, int]
    grid: tuple[int, int]
    scale: float
    return_lse: bool

    @property
    def is_empty(self) -> bool:
        return self.q.numel() == 0 or self.k.numel() == 0

    def empty_outputs(self) -> tuple[Tensor, Tensor | None]:
        """out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
        lse = empty(self.q, self.q.shape[:-1], lse_dtype(self.q)) if self.return_lse or self.grad else None
        return empty_like(self.q), lse


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: TileLists,
    *,
    tile: tuple[int, int, int],
    grid: tuple[int, int],
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """The tokens of a tile attend to those of the tiles that are listed for it: ``softmax(scale q k^T) v`` over them.

    Tiles are boxes of frames, rows and columns, in raster order, cut off at the borders: any size of video will do, and
    tokens stay where they are. Lists are the same for all batches or heads where they have one entry for these.

    Args:
        q: ``(B, T, S, H, D)``.
        k, v: ``(B, T, S, G, D)``; G divides H.
        tiles: which key tiles each of the ``n = ceil(T / tile[0]) ceil(rows / tile[1]) ceil(columns / tile[2])`` query
            tiles sees, as :func:`select_tiles` makes it or anybody else.
        tile: frames, rows and columns of a tile.
        grid: ``(rows, columns)`` of a frame's tokens, in raster order; ``rows * columns == S``.
        scale, return_lse, backend: as in :func:`video_attention`.

    Returns:
        ``(B, T, S, H, D)`` in q's dtype, contiguous; with ``return_lse`` also lse, float32 ``(B, T, S, H)``. Tokens of
        a tile that sees none get 0, and -inf.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes; lists out of range, unsorted or with repetitions:
            on the CPU, elsewhere where the environment variable ``VDCORE_CHECK`` is 1.
        BackendError: if the named backend cannot run the call.
    """
    op = TileCall.op
    qkv = check.check_qkv(op, *check.autocast(check.check_tensor(op, "q", q), k, v))
    if qkv.packed is not None:
        check.wrong(op, "k and v", "given", None)
    q, k, v = qkv.views
    B, T, S, H, D, _, G = qkv.sizes
    check.check_shape(op, "k", k, (B, T, S, G, D), "(B, T, S, G, D)")
    box, sizes = check_tiles(op, tile, grid, S)
    if not isinstance(tiles, TileLists):
        raise TypeError(f"{op}: tiles must be a TileLists, got {type(tiles).__name__}")
    n = tiles_of(T, sizes, box)
    _check_lists(op, tiles, q, B, H, n)
    scale = check.check_scale(op, scale, D)
    call = TileCall(q, k, v, tiles.indices, tiles.counts, box, sizes, scale, bool(return_lse))
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def _check_lists(op: str, tiles: TileLists, q: Tensor, B: int, H: int, n: int) -> None:
    shape = tiles.counts.shape
    if tiles.counts.device != q.device or tiles.indices.device != q.device:
        check.wrong(op, "tiles", f"on q's device {q.device}", f"{tiles.indices.device} and {tiles.counts.device}")
    if shape[0] not in (1, B) or shape[1] not in (1, H) or shape[2] != n:
        check.wrong(op, "tiles.counts", f"(B or 1, H or 1, n) with B = {B}, H = {H}, n = {n} tiles", tuple(shape))


def _with_checks(its: Implementation) -> Implementation:
    """Looks at the lists first, where the call runs: under torch.compile there is nothing to look at before."""

    def forward(call: TileCall) -> tuple[Tensor | None, ...]:
        checked(call)
        return its.forward(call)

    return replace(its, forward=forward)


@torch.no_grad()
def kept_mass(
    q: Tensor,
    k: Tensor,
    mask: Any,
    *,
    grid: tuple[int, int] | None = None,
    tile: tuple[int, int, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The share of every query's softmax that a mask keeps: ``exp(lse under the mask - lse of all)``. No gradient.

    Args:
        q: ``(B, T, S, H, D)``, as the scores see it, after norm and rope.
        k: ``(B, T_k, S, G, D)``; the last of its frames are those of q.
        mask: a FrameMask, a GridMask, a tuple of pairs ``(count, mask)`` as :func:`video_attention` takes it, or
            TileLists with ``tile``, which are of as many frames of k as of q.
        grid: ``(rows, columns)`` of a frame's tokens, with a GridMask and with lists.
        tile: frames, rows and columns of a tile, with lists.
        scale: default ``D ** -0.5``.

    Returns:
        float32 ``(B, T, S, H)``, from 0, where a query sees nothing, to 1.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
    """
    op = "kept_mass"
    q, k = (check.check_tensor(op, name, x).detach() for name, x in (("q", q), ("k", k)))
    _check_kept(op, q, k, mask, grid, tile, scale)
    # Values of one channel would do: what is wanted is lse.
    common: dict[str, Any] = {"scale": scale, "return_lse": True}
    if isinstance(mask, TileLists):
        _, kept = tile_attention(q, k, k, mask, tile=tile, grid=grid, **common)  # type: ignore[arg-type]
    else:
        _, kept = video_attention(q, k, k, mask=mask, grid=grid, **common)
    _, whole = video_attention(q, k, k, **common)
    return torch.where(kept == -torch.inf, 0, (kept - whole).exp()).clamp(max=1).to(torch.float32)


def _check_kept(op: str, q: Tensor, k: Tensor, mask: Any, grid: Any, tile: Any, scale: Any) -> None:
    """In its own name, not in that of the operators that it calls."""
    B, T, S, H, D, T_k, G = check.check_qkv(op, *check.autocast(q, k, k)).sizes
    check.check_scale(op, scale, D)
    if isinstance(mask, TileLists):
        if tile is None:
            check.wrong(op, "tile", "(frames, rows, columns) with TileLists", None)
        check.check_shape(op, "k", k, (B, T, S, G, D), "(B, T, S, G, D) with TileLists")
        box, sizes = check_tiles(op, tile, grid, S)
        _check_lists(op, mask, q, B, H, tiles_of(T, sizes, box))
        return
    if tile is not None:
        check.wrong(op, "tile", "None without TileLists", tile)
    check.check_mask_type(op, mask, grids=True)
    masks = check.check_grid_mask(op, mask, grid, S, H, G)
    for one in (masks,) if isinstance(masks, FrameMask) else (part.frames for _, part in masks.groups):
        check.check_teacher_forcing(op, one, T, T_k, max(T_k - T, 0))


register(
    tile_attention,
    TileCall,
    reference=_with_checks(by_formula(reference.tile_attention)),
    cpu=_with_checks(replace(cpu.TILES, tangents=cpu_tangents.tile_attention)),
    triton=_with_checks(triton.TILES),
)
