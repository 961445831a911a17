"""What all launches of a call of windows or of listed tiles share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vdcore.grid_mask import GridMask, HeadMasks
from vdcore_kernels.core.boxes import BoxTile, Windows
from vdcore_kernels.core.launch import cdiv
from vdcore_kernels.core.tokens import Pair, Tile
from vdcore_kernels.frame_attention.problem import Problem
from vdcore_kernels.tile_attention import plan


@dataclass(frozen=True, kw_only=True)
class BoxProblem(Problem):
    """q, k and v have frames of as many tokens.

    Args:
        grid: rows and columns of a frame.
        mask: windows; None: tiles are listed.
        tile: frames, rows and columns of a listed tile.
        tiles: int32 ``(B or 1, H or 1, n, K)`` and counts without K.
    """

    grid: tuple[int, int]
    mask: HeadMasks | None = None
    tile: plan.Box = (1, 1, 1)
    tiles: tuple[Tensor, Tensor] | None = None

    def parts(self) -> list[tuple[int, int, GridMask | None]]:
        """Heads [first, end) whose boxes are the same, and their mask: what a launch is for."""
        return [(0, self.q.shape[3], None)] if self.mask is None else list(self.mask.heads())

    def boxes(self, mask: GridMask | None, *, of_keys: bool, held: int, walked: int) -> plan.Boxes:
        T, T_k, device = self.q.shape[1], self.k.shape[1], self.q.device
        if mask is None:
            return plan.tiles(T, self.grid, self.tile, held=held, walked=walked, device=device)
        sizes = {"of_keys": of_keys, "held": held, "walked": walked, "device": device}
        return plan.windows(mask, self.grid, T, T_k, self.q_start, **sizes)

    def numbers(self, mask: GridMask | None, boxes: plan.Boxes) -> dict[str, Any]:
        """What the kernels take by the same names, but for tensors of tokens, and what a launch is for."""
        (_, T, S, H, _), (rows, columns) = self.q.shape, self.grid
        found: dict[str, Any] = {"S": S, "L": self.L, "H": H, "T": T, "T_k": self.k.shape[1], "q_start": self.q_start}
        for name, box in (("held", boxes.held_box), ("walked", boxes.walked_box)):
            found |= {f"{name}_rows": box[1], f"{name}_columns": box[2]}
        _, tile_rows, tile_columns = mask.tile if mask is not None else self.tile
        tile_rows, tile_columns = min(tile_rows, rows), min(tile_columns, columns)
        shift = int(mask is not None and mask.border == "shift")
        n_rows, n_columns = cdiv(rows, tile_rows), cdiv(columns, tile_columns)
        by = 1 / tile_rows, 1 / tile_columns
        windows = Windows(rows, columns, tile_rows, tile_columns, *by, n_rows, n_columns, shift)
        found |= windows._asdict() | self.list_numbers()
        return found | {"lengths": self.lengths, "exponent": self.exponent}

    def list_numbers(self) -> dict[str, int]:
        if self.tiles is None:
            return {"list_b": 0, "list_h": 0, "n": 0, "K": 0}
        batch, heads, n, K = self.tiles[0].shape
        return {"list_b": heads if batch > 1 else 0, "list_h": 1 if heads > 1 else 0, "n": n, "K": K}

    def programs(self, boxes: plan.Boxes, first: int, end: int, rows: int) -> dict[str, Any]:
        """What a launch is for: heads [first, end) of the held side, its boxes, and text in tiles of so many rows."""
        tiles = len(boxes.held) + cdiv(self.L, rows)
        found = {"first_head": first, "heads": end - first, "boxes": len(boxes.held), "tiles": tiles}
        return {
            **found,
            "programs": self.q.shape[0] * (end - first) * tiles,
            "like": self.q,
            "p_held": boxes.held,
            "p_walked": boxes.walked,
        }

    def box_constants(
        self, boxes: plan.Boxes, sides: Sequence[Pair], tile: Tile, dout: Tensor | None = None
    ) -> BoxTile:
        """sides: of all tensors that a kernel reads or writes, q, k and v first, but for dout, ``(B, N, H, D)``; tile:
        the constants of these."""
        (_, _, S, H, D), A = self.q.shape, tile.A
        token = max(H * D, 0 if dout is None else dout.stride(1))
        apart = [(S * token, token), *((x.video.t * A, x.video.s * A) for x in sides)]
        return BoxTile(
            *tile,
            LISTS=self.mask is None,
            EVEN=boxes.even,
            HELD_PARTS=boxes.parts[0],
            WALKED_PARTS=boxes.parts[1],
            CUT=self.lengths.frames is not None,
            SAME=sides[1].video[1:] == sides[2].video[1:],
            CLOSE=all(self._is_close(box, *far) for box in (boxes.held_box, boxes.walked_box) for far in apart),
        )

    def _is_close(self, box: plan.Box, frame: int, token: int) -> bool:
        """Whether 32 bits count elements between the places of a box, its frames and tokens so far from one another."""
        # Places beyond a box's tokens are counted, too: at most 128 in all.
        return (box[0] + 128) * frame * (box[0] > 1) + (box[1] * self.grid[1] + box[2]) * token < 2**31
