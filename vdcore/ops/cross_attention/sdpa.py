"""Cross attention by torch's own: one problem per sample, or per frame where each has a prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.ops.temporal_attention.sdpa import Dense


class _Prompts(Dense):
    def why_not_keys(self, c: Any) -> str | None:
        return None

    def inputs(self, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (c.q, c.k) if c.norm is None else (c.norm.q(c.q), c.norm.k(c.k))
        return q.to(c.q.dtype), k.to(c.q.dtype), c.v

    def split(self, c: Any, x: Tensor, *, keys: bool = False) -> list[Tensor]:
        if keys and x.ndim == 4:
            return [x.transpose(1, 2)]
        return [x.flatten(0, 1).transpose(1, 2)] if c.k.ndim == 5 else super().split(c, x)


CROSS = _Prompts().implementation()
