"""What a model is trained on: synthetic scenes drawn as they are asked for, or video files."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vdcore.video.files import rate_of
from vdcore.video.film import PICTURES, count_frames, count_good, picture_files, read_frames
from vdcore.video.scenes import MovingShapes

ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".gif", ".mpg", ".mpeg", ".y4m")


class Source(Protocol):
    """Clips without end."""

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """``(count, 3, T, H, W)`` in [0, 1]; all that is random comes from the generator."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, for a checkpoint: :func:`source_of` makes it again."""
        ...


class Scenes:
    """Clips of :class:`MovingShapes`; every draw is a new scene."""

    def __init__(self, shapes: MovingShapes) -> None:
        self.shapes = shapes

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        return self.shapes.batch(count, generator).video

    def describe(self) -> dict[str, Any]:
        return {"kind": "scenes", **asdict(self.shapes)}


@dataclass(frozen=True)
class Clip:
    """A video file, or a folder of pictures, and its frames as they are picked."""

    path: Path
    count: int


class Clips:
    """Windows of video files, decoded as they are drawn: of long films by seeking, so that memory does not grow with
    the length or the number of files. Short ones are kept in memory once they were decoded, up to 256 MB of them.

    Args:
        paths: files, and folders of files, which are searched.
        frames, size: ``T`` and ``(H, W)`` of a window; pictures are scaled to cover the size, and cropped.
        stride: every stride-th frame.
        fps: frames per second, in place of ``stride``.
        strict: raise for a bad or short file in a folder, too, as for one that is named by itself.
        workers: processes that decode; 0: this one. What is drawn does not depend on it.
        mirror: draw half of the windows mirrored: twice as many pictures, of which a small model remembers fewer.

    Attributes:
        clips: what is drawn from.
        left_out: the files in folders that are bad or short, each with the reason.

    Raises:
        FileNotFoundError: where there is no such file or folder, or no video in a folder.
        ValueError: if a file is no video, or has fewer frames than a window; of files in folders, if all are such.
            From ``batch``, with ``strict`` or for a file that is named by itself, where it turns out to be damaged.

    Warns:
        UserWarning: once, with a line for every file that is left out; and once for every file that turns out to be
            damaged when it is decoded: of one that has fewer frames than it says, windows are drawn from these, in
            place of one that has too few, the next.
    """

    HELD_FILE, HELD_FRAMES, HELD = 16 * 2**20, 1000, 256 * 2**20  # kept in memory: bytes and frames of a file, bytes

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        frames: int,
        size: tuple[int, int],
        stride: int = 1,
        *,
        fps: float | None = None,
        strict: bool = False,
        workers: int = 0,
        mirror: bool = False,
    ) -> None:
        if workers < 0:
            raise ValueError(f"Clips: workers must be at least 0, got {workers}")
        self.frames, self.size, self.stride, self.fps = frames, size, stride, fps
        self.strict, self.workers, self.named = strict, workers, set(map(Path, paths))
        self.mirror = mirror
        self.clips: list[Clip] = []
        self.left_out: list[tuple[Path, str]] = []
        for path in find_videos(paths):
            try:
                self.clips.append(Clip(path, self._count(path)))
            except ValueError as error:
                if strict or path in self.named:
                    raise
                self.left_out.append((path, str(error)))
        if self.left_out:
            reasons = "".join(f"\n  {reason}" for _, reason in self.left_out)
            if not self.clips:
                raise ValueError(f"Clips: none of {len(self.left_out)} files is good:{reasons}")
            warnings.warn(f"Clips: left out {len(self.left_out)} bad or short files:{reasons}", stacklevel=2)
        self.ends = torch.tensor([clip.count - frames + 1 for clip in self.clips]).cumsum(0)
        self.kept: OrderedDict[int, Tensor] = OrderedDict()
        self.under_way: dict[tuple[int, int], Future[Any]] = {}
        self.told: set[Path] = set()
        self.pool: ProcessPoolExecutor | None = None

    @property
    def paths(self) -> list[Path]:
        return [clip.path for clip in self.clips]

    def _count(self, path: Path) -> int:
        count = count_frames(path, self.stride, self.fps)
        if count < self.frames:
            found = f"{count} frames at {rate_of(self.stride, self.fps)}"
            raise ValueError(f"Clips: {path}: {found}, wanted {self.frames}")
        return count

    def _draw(self, count: int, generator: torch.Generator) -> list[tuple[int, int, bool]]:
        """File, first frame, whether it is mirrored."""
        drawn = torch.randint(int(self.ends[-1]), (count,), generator=generator)
        mirrored = torch.rand(count, generator=generator) < (0.5 if self.mirror else 0.0)
        which = torch.searchsorted(self.ends, drawn, right=True).tolist()
        starts = [n - (int(self.ends[i - 1]) if i else 0) for n, i in zip(drawn.tolist(), which)]
        return list(zip(which, starts, mirrored.tolist()))

    def prefetch(self, count: int, generator: torch.Generator) -> None:
        """Has the workers decode what the next batch draws from a generator in this state."""
        if self.workers:
            for i, start, _ in self._draw(count, generator):
                self._order(i, start)

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """Every window of every file is as likely as any other."""
        drawn = self._draw(count, generator)
        if self.workers:
            for i, start, _ in drawn:
                self._order(i, start)
        videos = []
        for i, start, flip in drawn:
            window = self._window(i, start).float() / 255
            videos.append(window.flip(-1) if flip else window)
        self.under_way.clear()
        return torch.stack(videos)

    def _is_short(self, i: int) -> bool:
        H, W = self.size
        return self.clips[i].count <= self.HELD_FRAMES and self.clips[i].count * 3 * H * W <= self.HELD_FILE

    def _job(self, i: int, start: int) -> tuple[Any, ...]:
        """Arguments of _decoded: a whole short file, or a window."""
        first, frames = (0, self.clips[i].count) if self._is_short(i) else (start, self.frames)
        return self.clips[i].path, first, frames, self.frames, self.size, self.stride, self.fps

    def _key(self, i: int, start: int) -> tuple[int, int]:
        return (i, -1) if self._is_short(i) else (i, start)

    def _order(self, i: int, start: int) -> None:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), torch.set_num_threads, (1,))
        if i not in self.kept and self._key(i, start) not in self.under_way:
            self.under_way[self._key(i, start)] = self.pool.submit(_decoded, *self._job(i, start))

    def _window(self, i: int, start: int) -> Tensor:
        """uint8 ``(3, T, H, W)``."""
        if i in self.kept:
            self.kept.move_to_end(i)
            found = self.kept[i]
        else:
            future = self.under_way.get(self._key(i, start))
            try:
                found, problem = _decoded(*self._job(i, start)) if future is None else future.result()
            except ValueError as error:
                if self.strict or self.clips[i].path in self.named or len(self.clips) == 1:
                    raise
                self._tell(i, f"{error}: another one is drawn in its place")
                other = (i + 1) % len(self.clips)
                return self._window(other, start % (self.clips[other].count - self.frames + 1))
            if problem is not None:
                if self.strict:
                    raise ValueError(problem)
                self._tell(i, problem)
            if self._is_short(i):
                self._keep(i, found)
        if not self._is_short(i):
            return found
        start %= found.shape[1] - self.frames + 1
        return found[:, start : start + self.frames]

    def _keep(self, i: int, clip: Tensor) -> None:
        self.kept[i] = clip
        while sum(x.nbytes for x in self.kept.values()) > self.HELD:
            self.kept.popitem(last=False)

    def _tell(self, i: int, what: str) -> None:
        if self.clips[i].path not in self.told:
            self.told.add(self.clips[i].path)
            warnings.warn(what, stacklevel=4)

    def describe(self) -> dict[str, Any]:
        found = {"kind": "clips", "paths": [str(path) for path in self.paths], "frames": self.frames}
        found |= {"size": list(self.size), "stride": self.stride, "mirror": self.mirror}
        if self.fps is not None:
            found["fps"] = self.fps
        if self.left_out:
            found["left_out"] = [str(path) for path, _ in self.left_out]
        return found


def _decoded(
    path: Path, start: int, frames: int, least: int, size: tuple[int, int], stride: int, fps: float | None
) -> tuple[Tensor, str | None]:
    """Frames as uint8 ``(3, T, H, W)``, and what is wrong with the file: where it has fewer than it says, as many as
    there are, or as ``frames`` asks for, of those that can be decoded, at a place that depends on ``start`` alone.

    Raises:
        ValueError: if fewer than ``least`` can be decoded.
    """
    problem = None
    try:
        pictures = read_frames(path, start, frames, size, stride, fps)
    except ValueError:
        good = count_good(path, stride, fps)
        if good < least:
            raise ValueError(f"Clips: {path}: {good} good frames at {rate_of(stride, fps)}, wanted {least}") from None
        problem = f"Clips: {path}: {good} good frames at {rate_of(stride, fps)}, fewer than it says"
        frames = min(frames, good)
        pictures = read_frames(path, start % (good - frames + 1), frames, size, stride, fps)
    return torch.from_numpy(pictures).permute(3, 0, 1, 2).contiguous(), problem


def source_of(description: dict[str, Any]) -> Source:
    """The source that :meth:`Source.describe` told of.

    Raises:
        FileNotFoundError, ValueError: where its files are gone, or the description is of something else.
    """
    values = dict(description)
    kind = values.pop("kind", None)
    values.pop("left_out", None)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if kind == "scenes":
        return Scenes(MovingShapes(**values))
    if kind == "clips":
        return Clips(**values)
    raise ValueError(f"source_of: kind must be scenes or clips, got {kind!r}")


def find_videos(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are named, folders searched for video files and folders of pictures; sorted within a folder.

    A folder with at least two pictures right in it, and no video, is a clip.

    Raises:
        FileNotFoundError: where there is no such file or folder, or no video in a folder.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()]
            folders = {p.parent for p in path.rglob("*") if p.suffix.lower() in PICTURES} - {p.parent for p in files}
            inside = sorted([*files, *(folder for folder in folders if len(picture_files(folder)) > 1)])
            if not inside:
                raise FileNotFoundError(f"find_videos: {path}: no video ({', '.join(ENDINGS)}) in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"find_videos: {path}: no such file or folder")
    if not found:
        raise FileNotFoundError("find_videos: no paths given")
    return found
