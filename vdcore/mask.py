"""Which frames a frame may see."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

Run = tuple[int, int]

FAR = 2**31 - 1  # no video has more frames, rows or columns; products of two such numbers stay inside int64


def bounded(x: int) -> int:
    """A number as tensors and engines take it: a larger one means as much."""
    return min(x, FAR)


def check_count(owner: str, name: str, value: Any, least: int = 0) -> None:
    """An int from ``least``, however large."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def as_count(owner: str, name: str, value: Any) -> int:
    """A size that somebody asks about, as an int: torch.compile specialises on symbolic ones."""
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}") from None
    check_count(owner, name, found)
    return found


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
        clean: frames of the clean half of a sequence for teacher forcing, see :meth:`teacher_forcing`; 0: none.
        shots: first frames of shots, ascending. The last of them at or before a query frame, the first frame of its own
            shot, never falls out of its past window. In place of ``sink``.

    For every query frame the visible keys are at most two contiguous runs: see :meth:`runs`.
    """

    past: int | None = None
    future: int | None = None
    chunk: int = 1
    sink: int = 0
    clean: int = 0
    shots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("past", "future", "chunk", "sink", "clean"):
            value = getattr(self, name)
            if value is None and name in ("past", "future"):
                continue
            check_count("FrameMask", name, value, 1 if name == "chunk" else 0)
        if self.shots != ():
            self._check_shots()
        if self.clean:
            for name, unset in (("future", None), ("sink", 0), ("shots", ())):
                value = getattr(self, name)
                if value != unset:
                    raise ValueError(f"FrameMask: {name} must be {unset!r} beside clean={self.clean}, got {value!r}")

    def _check_shots(self) -> None:
        shots = self.shots
        if not isinstance(shots, tuple) or any(isinstance(s, bool) or not isinstance(s, int) for s in shots):
            raise TypeError(f"FrameMask: shots must be a tuple of ints, got {shots!r}")
        if shots[0] < 0 or any(a >= b for a, b in pairwise(shots)):
            raise ValueError(f"FrameMask: shots must ascend from 0 or above, got {shots!r}")
        if self.sink:
            raise ValueError(f"FrameMask: sink must be 0 beside shots, which take its place, got {self.sink}")

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

    @staticmethod
    def teacher_forcing(frames: int, chunk: int = 1, past: int | None = None) -> FrameMask:
        """Training of causal models on all chunks at once, over ``2 * frames`` frames: clean ones, then noisy ones.

        With ``c = (frame % frames) // chunk``, a clean frame sees clean frames of chunks up to its own, and a noisy
        frame clean frames of chunks before its own and the noisy frames of its own. So each noisy chunk is computed as
        it would be after a cache of clean ones. Clean and noisy frame i are one place in time: a rope table of
        ``frames`` rows is passed twice, ``torch.cat((cos, cos))``.

        Args:
            frames: of the video.
            chunk: frames that are generated together.
            past: earlier chunks that a frame sees; ``None``: all of them.
        """
        if not isinstance(frames, int) or isinstance(frames, bool):
            raise TypeError(f"FrameMask.teacher_forcing: frames must be an int, got {frames!r}")
        if frames < 1:
            raise ValueError(f"FrameMask.teacher_forcing: frames must be at least 1, got {frames}")
        return FrameMask(past=past, chunk=chunk, clean=frames)

    def beyond(self, T_q: int, T_k: int, q_start: int) -> str | None:
        """What is wrong with so many frames under this mask: ``"q_start + T"`` or ``"T_k"``; None: nothing."""
        if not self.clean:
            return None
        names = (("q_start + T", q_start + T_q), ("T_k", T_k))
        return next((f"{name} = {n}" for name, n in names if n > 2 * self.clean), None)

    def _frames(self, T_q: int, T_k: int | None, q_start: int) -> tuple[int, int, int]:
        T_q, q_start = as_count("FrameMask", "T", T_q), as_count("FrameMask", "q_start", q_start)
        found = T_q, as_count("FrameMask", "T_k", q_start + T_q if T_k is None else T_k), q_start
        if wrong := self.beyond(*found):
            most = f"2 * clean = {2 * self.clean}"
            raise ValueError(f"FrameMask: T_k and q_start + T must be at most {most}, got {wrong}")
        return found

    def visible(self, T_q: int, T_k: int | None = None, q_start: int = 0) -> torch.Tensor:
        """The definition, as a boolean tensor ``(T_q, T_k)``. ``T_k=None`` means ``q_start + T_q``.

        Args:
            q_start: index, among the key frames, of the first query frame.
        """
        T_q, T_k, q_start = self._frames(T_q, T_k, q_start)
        q = torch.arange(q_start, q_start + T_q)[:, None]
        k = torch.arange(T_k)[None, :]
        if self.clean:
            return self._visible_teacher_forcing(q, k)
        cq, ck = q // bounded(self.chunk), k // bounded(self.chunk)
        seen = torch.ones(T_q, T_k, dtype=torch.bool)
        if self.future is not None:
            seen = seen & (ck <= cq + bounded(self.future))
        if self.past is not None:
            kept = k < bounded(self.sink)
            if self.shots:
                shots = [bounded(shot) for shot in self.shots]
                first = torch.tensor((-1, *shots))  # of the shot of every query frame, -1 before the first one
                kept = k == first[(torch.tensor(shots) <= q).sum(-1, keepdim=True)]
            seen = seen & ((ck >= cq - bounded(self.past)) | kept)
        return seen

    def _visible_teacher_forcing(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        clean, chunk = bounded(self.clean), bounded(self.chunk)
        cq, ck = q % clean // chunk, k % clean // chunk
        noisy_q, noisy_k = q >= clean, k >= clean
        seen = torch.where(noisy_q, ck < cq, ck <= cq) & ~noisy_k
        if self.past is not None:
            seen = seen & (ck >= cq - bounded(self.past))
        return seen | (noisy_q & noisy_k & (ck == cq))

    def runs(self, T_q: int, T_k: int | None = None, q_start: int = 0) -> tuple[tuple[Run, ...], ...]:
        """Per query frame the visible key frames as 0 to 2 half-open runs, sorted, merged where they touch."""
        return _runs(self, *self._frames(T_q, T_k, q_start))

    def density(self, T_q: int, T_k: int | None = None, q_start: int = 0) -> float:
        """Visible pairs over all pairs; 0 where there are none."""
        T_q, T_k, q_start = self._frames(T_q, T_k, q_start)
        if T_q * T_k == 0:
            return 0.0
        return sum(end - begin for runs in self.runs(T_q, T_k, q_start) for begin, end in runs) / (T_q * T_k)

    def frame_runs(self, q: int, T_k: int) -> tuple[Run, Run]:
        """Two runs of key frames that query frame q sees; either may be empty, and they may touch."""
        if self.clean:
            noisy, frame = divmod(q, self.clean)
            chunk = frame // self.chunk
            begin = 0 if self.past is None else max(chunk - self.past, 0) * self.chunk
            own, after = chunk * self.chunk, min((chunk + 1) * self.chunk, self.clean)
            if not noisy:
                return _cut(begin, after, T_k), (T_k, T_k)
            return _cut(begin, own, T_k), _cut(self.clean + own, self.clean + after, T_k)
        chunk = q // self.chunk
        end = T_k if self.future is None else min(T_k, (chunk + self.future + 1) * self.chunk)
        begin = 0 if self.past is None else min(max(chunk - self.past, 0) * self.chunk, end)
        if not self.shots:
            return (0, min(self.sink, begin)), (begin, end)
        shot = bisect_right(self.shots, q) - 1
        first = self.shots[shot] if shot >= 0 else begin
        return _cut(first, first + 1, begin), (begin, end)


def _cut(begin: int, end: int, most: int) -> Run:
    return min(begin, most), min(end, most)


@lru_cache(maxsize=256)
def _runs(mask: FrameMask, T_q: int, T_k: int, q_start: int) -> tuple[tuple[Run, ...], ...]:
    rows = []
    for q in range(q_start, q_start + T_q):
        first, second = mask.frame_runs(q, T_k)
        runs = [(first[0], second[1])] if first[1] == second[0] else [first, second]
        rows.append(tuple(run for run in runs if run[0] < run[1]))
    return tuple(rows)
