"""What a model is trained on: synthetic scenes drawn as they are asked for, or video files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vdcore.video.files import rate_of, read_clip
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


class Clips:
    """Windows of video files, which are held in memory as bytes.

    Args:
        paths: files, and folders of files, which are searched.
        frames, size: ``T`` and ``(H, W)`` of a window; pictures are scaled to cover the size, and cropped.
        stride: every stride-th frame.
        fps: frames per second, in place of ``stride``.
        strict: raise for a bad or short file in a folder, too, as for one that is named by itself.

    Attributes:
        left_out: the files in folders that are bad or short, each with the reason.

    Raises:
        FileNotFoundError: where there is no such file or folder, or no video in a folder.
        ValueError: if a file is no video, or has fewer frames than a window; of files in folders, if all are such.

    Warns:
        UserWarning: once, with a line for every file that is left out.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        frames: int,
        size: tuple[int, int],
        stride: int = 1,
        *,
        fps: float | None = None,
        strict: bool = False,
    ) -> None:
        self.frames, self.size, self.stride, self.fps = frames, size, stride, fps
        self.paths: list[Path] = []
        self.clips: list[Tensor] = []
        self.left_out: list[tuple[Path, str]] = []
        named = set(map(Path, paths))
        for path in find_videos(paths):
            try:
                clip = self._read(path)
            except ValueError as error:
                if strict or path in named:
                    raise
                self.left_out.append((path, str(error)))
            else:
                self.paths.append(path)
                self.clips.append(clip)
        if self.left_out:
            reasons = "".join(f"\n  {reason}" for _, reason in self.left_out)
            if not self.clips:
                raise ValueError(f"Clips: none of {len(self.left_out)} files is good:{reasons}")
            warnings.warn(f"Clips: left out {len(self.left_out)} bad or short files:{reasons}", stacklevel=2)
        windows = torch.tensor([clip.shape[1] - frames + 1 for clip in self.clips])
        self.ends = windows.cumsum(0)

    def _read(self, path: Path) -> Tensor:
        """uint8 ``(3, T, H, W)``."""
        clip = read_clip(path, size=self.size, stride=self.stride, fps=self.fps)
        if clip.shape[1] < self.frames:
            found = f"{clip.shape[1]} frames at {rate_of(self.stride, self.fps)}"
            raise ValueError(f"Clips: {path}: {found}, wanted {self.frames}")
        return (clip * 255).round().to(torch.uint8)

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """Every window of every file is as likely as any other; half of them are mirrored."""
        drawn = torch.randint(int(self.ends[-1]), (count,), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        which = torch.searchsorted(self.ends, drawn, right=True)
        videos = []
        for n, i, flip in zip(drawn.tolist(), which.tolist(), mirrored.tolist()):
            start = n - (int(self.ends[i - 1]) if i else 0)
            window = self.clips[i][:, start : start + self.frames].float() / 255
            videos.append(window.flip(-1) if flip else window)
        return torch.stack(videos)

    def describe(self) -> dict[str, Any]:
        found = {"kind": "clips", "paths": [str(path) for path in self.paths], "frames": self.frames}
        found |= {"size": list(self.size), "stride": self.stride}
        if self.fps is not None:
            found["fps"] = self.fps
        if self.left_out:
            found["left_out"] = [str(path) for path, _ in self.left_out]
        return found


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
    """Files as they are named, folders searched for video files; sorted within a folder.

    Raises:
        FileNotFoundError: where there is no such file or folder, or no video in a folder.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
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
