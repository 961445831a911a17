"""Spatial and video attention by torch's own; spatial attention has frames as the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.grid_mask import HeadMasks
from vdcore.mask import FrameMask
from vdcore.ops.temporal_attention.sdpa import Dense


def _is_spatial(c: Any) -> bool:
    return c.mask == FrameMask.same_frame() and c.q_start == 0 and c.q.shape[1] == c.k.shape[1]


class _Frames(Dense):
    def why_not_keys(self, c: Any) -> str | None:
        if isinstance(c.mask, HeadMasks):
            return "windows in rows and columns would need a mask"
        if c.text is not None:
            return "text would have to be concatenated to the video's keys"
        return None if _is_spatial(c) else super().why_not_keys(c)

    def inputs(self, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm_rope(c, c.k, c.v, 0) if _is_spatial(c) else super().inputs(c)

    def split(self, c: Any, x: Tensor, *, keys: bool = False) -> list[Tensor]:
        return [x.flatten(0, 1).transpose(1, 2)] if _is_spatial(c) else super().split(c, x)


FRAMES = _Frames().implementation()
