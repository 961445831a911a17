"""Lists of tiles: whether they are right, and how they are made of what tiles hold."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops import check
from vdcore.ops.tile_attention.boxes import check_tiles, tiles_of
from vdcore.tile_lists import TileLists

if TYPE_CHECKING:
    from vdcore.ops.tile_attention import TileCall


def checked(call: TileCall) -> None:
    """Lists out of range, unsorted or with repetitions are an error: on a GPU only where ``VDCORE_CHECK`` is 1."""
    if not call.q.is_cpu and os.environ.get("VDCORE_CHECK") != "1":
        return
    K, n = call.indices.shape[3], tiles_of(call.q.shape[1], call.grid, call.tile)
    bad = (call.counts < 0) | (call.counts > K)
    if bad.any():
        check.wrong(call.op, "tiles.counts", f"from 0 to K = {K}", call.counts[bad][0].item())
    there = torch.arange(K, device=call.counts.device) < call.counts[..., None]
    out = there & ((call.indices < 0) | (call.indices >= n))
    if out.any():
        check.wrong(call.op, "tiles.indices", f"from 0 to n - 1 = {n - 1}", call.indices[out][0].item())
    fallen = there[..., 1:] & (call.indices[..., 1:] <= call.indices[..., :-1])
    if fallen.any():
        at = fallen.nonzero()[0].tolist()
        pair = call.indices[tuple(at[:3])][at[3] : at[3] + 2].tolist()
        got = f"{pair[0]} before {pair[1]} in list {at[:3]}"
        check.wrong(call.op, "tiles.indices", "ascending, each tile at most once", got)


@torch.no_grad()
def select_tiles(
    q: Tensor,
    k: Tensor,
    *,
    tile: tuple[int, int, int],
    grid: tuple[int, int],
    keep: int | float,
    scale: float | None = None,
) -> TileLists:
    """Lists of the key tiles that matter to each query tile, judged by the means of q and k over a tile's tokens.

    The coarse stage of VSA (Zhang et al. 2025), MoBA (Lu et al. 2025) and SpargeAttention (Zhang et al. 2025): scores
    ``scale mean(q) mean(k)^T`` between tiles. A tile always keeps itself; ties go to the lower index. No gradient.

    Args:
        q: ``(B, T, S, H, D)``.
        k: ``(B, T, S, G, D)``; G divides H.
        tile: frames, rows and columns of a tile.
        grid: ``(rows, columns)`` of a frame's tokens; ``rows * columns == S``.
        keep: an int: so many tiles, its own counted; a float in (0, 1]: its own and the best others, until their share
            of the softmax over tiles is that much.
        scale: default ``D ** -0.5``.

    Returns:
        Lists ``(B, H, n, K)``, ascending.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
    """
    op = "select_tiles"
    q, k = check.autocast(check.check_tensor(op, "q", q), k)
    check.check_main(op, "q", q, "(B, T, S, H, D)")
    check.check_like(op, "k", k, q, "q")
    check.check_dims(op, "k", k, "(B, T, S, G, D)")
    B, T, S, H, D = q.shape
    check.check_shape(op, "k", k, (B, T, S, k.shape[3], D), "(B, T, S, G, D)")
    check.check_groups(op, "k", k.shape[3], H)
    box, sizes = check_tiles(op, tile, grid, S)
    _check_keep(op, keep)
    scale = check.check_scale(op, scale, D)
    with check.without_autocast(q):  # scores are of float32 at least
        return _best(_scores(q, k, box, sizes, scale), keep)


def _scores(q: Tensor, k: Tensor, box: tuple[int, int, int], sizes: tuple[int, int], scale: float) -> Tensor:
    """``(B, H, n, n)``: between the means of tiles."""
    mine, theirs = (means(x.detach(), box, sizes).transpose(1, 2) for x in (q, k))
    return mine @ theirs.repeat_interleave(q.shape[3] // max(k.shape[3], 1), 1).mT * scale


def _check_keep(op: str, keep: Any) -> None:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{op}: keep must be an int or a float, got {keep!r}")
    if isinstance(keep, int) and keep < 1:
        check.wrong(op, "keep", "at least 1 tile", keep)
    if isinstance(keep, float) and not 0 < keep <= 1:
        check.wrong(op, "keep", "a share in (0, 1] of the mass, or an int number of tiles", keep)


def _best(scores: Tensor, keep: int | float) -> TileLists:
    """Lists of scores ``(B, H, n, n)``."""
    n = scores.shape[-1]
    own = torch.eye(n, dtype=torch.bool, device=scores.device)
    order = scores.masked_fill(own, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    if isinstance(keep, int) or keep == 1:
        many = min(keep, n) if isinstance(keep, int) else n
        counts = torch.full(scores.shape[:-1], many, dtype=torch.int32, device=scores.device)
    else:
        mass = scores.to(torch.float64).softmax(-1).gather(-1, order).cumsum(-1)
        # As many as come before the mass is reached, and the one that reaches it.
        counts = ((mass < keep).sum(-1) + 1).clamp(max=n).to(torch.int32)
        many = n
    place = torch.arange(n, device=scores.device)
    chosen = torch.where(place < counts[..., None], order, n)[..., :many]  # n: none, and sorted to the end
    indices = chosen.sort(-1).values.to(torch.int32)
    return TileLists(indices.clamp(max=max(n - 1, 0)), counts)


def means(x: Tensor, tile: tuple[int, int, int], grid: tuple[int, int]) -> Tensor:
    """``(B, n, heads, D)`` of ``(B, T, S, heads, D)``: over the tokens of every tile, in float32 at least."""
    whole = x.unflatten(2, grid)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = torch.ones((), dtype=dtype, device=x.device)
    for axis, step in zip((3, 2, 1), reversed(tile)):  # columns first: what is left to read is less
        whole, sizes = _sums(whole, axis, step, dtype)
        count = count * sizes.view(-1, *(1,) * (5 - axis))
    return (whole / count).flatten(1, 3)


def _sums(x: Tensor, axis: int, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums over every ``step`` places of an axis, the last of fewer, and how many these are."""
    size = x.shape[axis]
    even = size // step * step
    parts = [x.narrow(axis, 0, even).unflatten(axis, (size // step, step)).sum(axis + 1, dtype=dtype)]
    if even < size:
        parts.append(x.narrow(axis, even, size - even).sum(axis, keepdim=True, dtype=dtype))
    places = torch.arange(0, size, step, device=x.device)
    return torch.cat(parts, axis), (size - places).clamp(max=step).to(dtype)
