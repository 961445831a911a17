"""Which frames a frame may see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

Run = tuple[int, int]


@dataclass(frozen=True)
class FrameMask:
    """Visibility between frames, in units of frames.

    With ``cq = q // chunk`` and ``ck = k // chunk``, key frame ``k`` is visible to query frame ``q`` iff
    ``(future is None or ck <= cq + future) and (past is None or ck >= cq - past or k < sink)``.

    Args:
        past: earlier chunks that a frame sees; ``None``: all of them.
        future: later chunks that a frame sees; ``None``: all of them; 0: none, causal.
        chunk: frames per chunk; frames of one chunk always see one another.
        sink: the first ``sink`` frames never fall out of the past window. A sink never shows a frame its future.

    For every query frame the visible keys are at most two contiguous runs: see :meth:`runs`.
    """

    past: int | None = None
    future: int | None = None
    chunk: int = 1
    sink: int = 0

    def __post_init__(self) -> None:
        for name in ("past", "future", "chunk", "sink"):
            value = getattr(self, name)
            if value is None and name in ("past", "future"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"FrameMask: {name} must be an int, got {value!r}")
            least = 1 if name == "chunk" else 0
            if value < least:
                raise ValueError(f"FrameMask: {name} must be at least {least}, got {value}")

    @staticmethod
    def full() -> FrameMask:
        """Every frame sees every frame."""
        return FrameMask()

    @staticmethod
    def same_frame() -> FrameMask:
        """A frame sees itself only: spatial attention."""
        return FrameMask(past=0, future=0)

    @staticmethod
    def causal() -> FrameMask:
        """A frame sees itself and everything before it."""
        return FrameMask(future=0)

    @staticmethod
    def window(past: int, future: int = 0) -> FrameMask:
        """A frame sees itself, ``past`` frames before it and ``future`` frames after it."""
        return FrameMask(past=past, future=future)

    @staticmethod
    def symmetric(radius: int) -> FrameMask:
        """A frame sees ``radius`` frames to either side."""
        return FrameMask(past=radius, future=radius)

    @staticmethod
    def seconds(past: float, fps: float, temporal_stride: int = 1, future: float = 0.0) -> FrameMask:
        """A horizon in seconds of video, in latent frames: ``ceil(seconds * fps / temporal_stride)``.

        Args:
            past, future: seconds that a frame sees before and after itself.
            fps: frames per second of the video.
            temporal_stride: video frames per latent frame.
        """
        for name, value in (("past", past), ("future", future)):
            if not value >= 0:
                raise ValueError(f"FrameMask.seconds: {name} must be at least 0, got {value}")
        for name, value in (("fps", fps), ("temporal_stride", temporal_stride)):
            if not value > 0:
                raise ValueError(f"FrameMask.seconds: {name} must be positive, got {value}")

        def frames(seconds: float) -> int:
            return max(math.ceil(seconds * fps / temporal_stride - 1e-6), 0)

        return FrameMask(past=frames(past), future=frames(future))

    def visible(self, T_q: int, T_k: int | None = None, q_start: int = 0) -> torch.Tensor:
        """The definition, as a boolean tensor ``(T_q, T_k)``. ``T_k=None`` means ``q_start + T_q``.

        Args:
            q_start: index, among the key frames, of the first query frame.
        """
        T_k = q_start + T_q if T_k is None else T_k
        q = torch.arange(q_start, q_start + T_q)[:, None]
        k = torch.arange(T_k)[None, :]
        cq, ck = q // self.chunk, k // self.chunk
        seen = torch.ones(T_q, T_k, dtype=torch.bool)
        if self.future is not None:
            seen = seen & (ck <= cq + self.future)
        if self.past is not None:
            seen = seen & ((ck >= cq - self.past) | (k < self.sink))
        return seen

    def runs(self, T_q: int, T_k: int | None = None, q_start: int = 0) -> tuple[tuple[Run, ...], ...]:
        """Per query frame the visible key frames as 0 to 2 half-open runs, sorted, merged where they touch."""
        T_k = q_start + T_q if T_k is None else T_k
        return _runs(self, int(T_q), int(T_k), int(q_start))  # int: torch.compile specialises on symbolic frame counts

    def density(self, T_q: int, T_k: int | None = None, q_start: int = 0) -> float:
        """Visible pairs over all pairs; 0 where there are none."""
        T_k = q_start + T_q if T_k is None else T_k
        if T_q * T_k == 0:
            return 0.0
        return sum(end - begin for runs in self.runs(T_q, T_k, q_start) for begin, end in runs) / (T_q * T_k)


@lru_cache(maxsize=256)
def _runs(mask: FrameMask, T_q: int, T_k: int, q_start: int) -> tuple[tuple[Run, ...], ...]:
    rows = []
    for q in range(q_start, q_start + T_q):
        chunk = q // mask.chunk
        end = T_k if mask.future is None else min(T_k, (chunk + mask.future + 1) * mask.chunk)
        begin = 0 if mask.past is None else min(max(chunk - mask.past, 0) * mask.chunk, end)
        sink = min(mask.sink, begin)
        runs = [(0, end)] if sink == begin else [(0, sink), (begin, end)]
        rows.append(tuple(run for run in runs if run[0] < run[1]))
    return tuple(rows)
