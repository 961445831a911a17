"""What all launches of a call share: spatial, video and cross attention, and, but for the mask, windows and tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.frames import Frames, frame_bounds
from vdcore_kernels.core.launch import Config, arch_of, pick
from vdcore_kernels.core.tile import Row
from vdcore_kernels.core.tokens import (
    Layout,
    Lengths,
    Sizes,
    Tile,
    amd_alignment,
    layout_of,
    near,
    query_tiles,
)

Triple = tuple[Tensor, Tensor, Tensor]
NO_LENGTHS = Lengths(None, None, None)


@dataclass(frozen=True)
class FrameConfig(Config):
    """m, n: rows of a tile of queries and of keys; for at most ``channels`` channels of at most ``size`` bytes."""

    m: int = 128
    n: int = 64
    channels: int = 256
    size: int = 2


# Warps that multiply as warps, not as a warpgroup, hold 16 rows each: eight of them share 128, and 64 rows twice.
SMALL = "sm_8|sm_11|sm_12"
# Of these all but sm_80, whose programs can have 163 KB of shared memory, not 99.
SMALLER = "sm_86|sm_87|sm_89|sm_11|sm_12"
# Not as three products of tf32 (tf32x3): a tensor core cuts its sums toward zero, and a model of that errs by up to 0.8
# of what the tolerance rule allows at 64 channels and 1.2 at 128 (tests/ops/test_tf32x3.py), plain units by 0.4.
FLOAT32 = "float32 is multiplied exactly, on the plain units: small tiles keep its operands in registers"


def pick_for(table: tuple[FrameConfig, ...], q: Tensor) -> FrameConfig:
    D, size = q.shape[-1], q.element_size()
    return pick(table, arch_of(q), lambda c: c.channels >= D and c.size >= size)


P = TypeVar("P", bound="Problem")


@dataclass(frozen=True)
class Problem:
    """Tokens and text, normalized and rotated; which of them see which, its classes say.

    Args:
        q: ``(B, T, S_q, H, D)``.
        k, v: ``(B, T_k, S_k, G, D)``.
        sm_scale: of the scores.
        q_start: the key frame of the first query frame.
        lengths: of the video and of the text.
        text: its queries, keys and values ``(B, L, heads, D)``, or None.
        text_first: it comes before the video in the result.
        text_sees: it sees the video.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sm_scale: float
    q_start: int = 0
    lengths: Lengths = NO_LENGTHS
    text: Triple | None = None
    text_first: bool = False
    text_sees: bool = True

    @property
    def L(self) -> int:
        return 0 if self.text is None else self.text[0].shape[1]

    @property
    def exponent(self) -> float:
        """The scale's size for powers of two. Not quite 0: a maximum of -inf is multiplied by it."""
        return max(abs(self.sm_scale), 1e-30) / math.log(2)

    def with_positive_scores(self: P) -> P:
        """The same with queries, negated or not, whose scores take the size of the scale; text's tokens are near."""
        q, text = self.q, self.text
        if self.sm_scale >= 0 and text is None:
            return self
        if text is not None:
            text_q, text_k, text_v = (near(x) for x in text)
            text = (-text_q if self.sm_scale < 0 else text_q, text_k, text_v)
        return replace(self, q=-q if self.sm_scale < 0 else q, text=text)

    def layout(self) -> Layout:
        """Of q, k and v."""
        return layout_of((self.q, self.k, self.v), self.text)

    def constants(self, layout: Layout, config: FrameConfig, row: Row) -> Tile:
        """Of kernels over tiles of tokens that lie so."""
        return Tile(
            ROW=row,
            A=layout.A,
            R=self.q.shape[3] // self.k.shape[3],
            BM=config.m,
            BN=config.n,
            FLAT=layout.flat,
            TEXT=self.text is not None,
            TEXT_FIRST=self.text_first,
            TEXT_SEES=self.text_sees,
            AMD=amd_alignment(layout.pairs, layout.A),
        )


@dataclass(frozen=True, kw_only=True)
class FrameProblem(Problem):
    """mask: which frames see which."""

    mask: FrameMask

    @cached_property
    def frames(self) -> Frames:
        frames, _ = frame_bounds(self.mask, self.q.shape[1], self.k.shape[1], self.q_start, self.q.device)
        return frames

    @cached_property
    def sizes(self) -> Sizes:
        _, _, S_q, H, _ = self.q.shape
        return Sizes(S_q, self.k.shape[2], self.L, H)

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """What the kernels take by the same names, but for tensors of tokens."""
        numbers = {**self.sizes._asdict(), **self.frames._asdict(), "exponent": self.exponent}
        return {"lengths": self.lengths, **numbers}

    def query_programs(self, BM: int) -> tuple[int, int]:
        """Programs of a kernel over queries, and tiles per sample and head."""
        (B, T, S_q, H, _), frames = self.q.shape, self.frames
        tiles = query_tiles(T, S_q, self.L, frames.q_start, frames.group, BM)
        return B * H * tiles, tiles
