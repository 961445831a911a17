"""Parts of long films: how many frames there are without decoding any, and windows of them by seeking.

A film is a video file, or a folder of pictures in the natural order of their names. Frames are picked as by
:func:`vdcore.video.read_clip`, and shown as there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vdcore.extras import need
from vdcore.video.files import picture_of, rate_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def picture_files(folder: Path) -> list[Path]:
    """The pictures right in a folder, ``2.png`` before ``10.png``."""

    def parts(path: Path) -> list[Any]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file()), key=parts)


def count_frames(path: str | os.PathLike[str], stride: int = 1, fps: float | None = None) -> int:
    """How many frames :func:`vdcore.video.read_clip` would return.

    From what the file says of itself; where it does not, or under ``fps``, from the times of its packets, for which it
    is read but not decoded. A file that is damaged or cut short may have fewer.

    Raises:
        ValueError: if it is no video, or frames have no times and ``fps`` asks for them.
    """
    path = Path(path)
    if path.is_dir():
        if fps is not None:
            raise ValueError(f"count_frames: {path}: pictures have no times, which fps needs; pick them by stride")
        return -(-len(picture_files(path)) // stride)
    if fps is not None:
        return len(_picks(path, fps))
    with _open(path) as (_, stream):
        declared = stream.frames
    return -(-(declared or len(_times(*_identity(path))[0])) // stride)


def count_good(path: Path, stride: int = 1, fps: float | None = None) -> int:
    """The same, of the frames that can be decoded, which are all decoded for it."""
    if path.is_dir():
        return count_frames(path, stride)
    return _count_good(*_identity(path), stride, fps)


@lru_cache(maxsize=1024)
def _count_good(name: str, changed: int, length: int, stride: int, fps: float | None) -> int:
    good = 0
    try:
        for _ in _decoded(Path(name)):
            good += 1
    except ValueError:
        pass
    return -(-good // stride) if fps is None else int((_picks(Path(name), fps) < good).sum())


def read_frames(
    path: str | os.PathLike[str],
    start: int,
    frames: int,
    size: tuple[int, int] | None = None,
    stride: int = 1,
    fps: float | None = None,
) -> np.ndarray:
    """``(T, H, W, 3)`` uint8: what :func:`vdcore.video.read_clip` gives, decoding no more than it must.

    Raises:
        ValueError: if there are fewer frames, or they cannot be decoded.
    """
    path = Path(path)
    if path.is_dir():
        chosen = picture_files(path)[start * stride :: stride][:frames]
        found = list(read_pictures(path, chosen, size)) if chosen else []
    else:
        numbers = list(range(start * stride, (start + frames) * stride, stride))
        if fps is not None:
            numbers = _picks(path, fps)[start : start + frames].tolist()
        found = _by_seeking(path, numbers, size) if numbers else []
    if len(found) < frames:
        what = f"{len(found)} of {frames} frames"
        raise ValueError(f"read_frames: {path}: {what} from frame {start} on at {rate_of(stride, fps)}")
    return np.stack(found)


def read_pictures(folder: Path, names: list[Path], size: tuple[int, int] | None) -> np.ndarray:
    """``(T, H, W, 3)`` uint8.

    Raises:
        ValueError: if one is no picture, or they have different sizes and ``size`` is None.
    """
    found = [picture_of(name, *next(_decoded(name)), size) for name in names]
    if len(shapes := {picture.shape[:2] for picture in found}) > 1:
        raise ValueError(f"read_frames: {folder}: pictures of different sizes {sorted(shapes)}, which need size=")
    return np.stack(found)


def _identity(path: Path) -> tuple[str, int, int]:
    """What a file's index is kept by: another file of the same name has another."""
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


class _open:
    """A container and its video stream."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[Any, Any]:
        av = need("av", "video", "read_frames")
        try:
            self.container = av.open(str(self.path))
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(f"read_frames: {self.path}: not a video file: {error}") from None
        if not self.container.streams.video:
            self.container.close()
            raise ValueError(f"read_frames: {self.path}: no video stream in it")
        stream = self.container.streams.video[0]
        stream.thread_type = "AUTO"
        return self.container, stream

    def __exit__(self, *error: object) -> None:
        self.container.close()


@lru_cache(maxsize=64)
def _times(name: str, changed: int, size: int) -> tuple[np.ndarray, Fraction]:
    """The times of a file's frames, in order, in units of the second number; empty where frames have none."""
    with _open(Path(name)) as (container, stream):
        packets = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
        base = stream.time_base
    if base is None or any(pts is None for pts in packets):
        return np.empty(0, np.int64), Fraction(1)
    return np.unique(np.array(packets, np.int64)), base


def _picks(path: Path, fps: float) -> np.ndarray:
    """Numbers of the frames nearest to ``n / fps`` after the first, the earlier one of two that are as near."""
    times, base = _times(*_identity(path))
    if not len(times):
        raise ValueError(f"read_frames: {path}: its frames have no times, which fps needs; pick them by stride")
    rate = Fraction(fps).limit_denominator(10**6)
    times = times - times[0]
    gap = int(times[-1] - times[-2]) if len(times) > 1 else 0
    # n / rate <= (t + u) base / 2, without fractions.
    unit = rate.numerator * base.numerator
    borders = unit * np.append(times[:-1] + times[1:], 2 * times[-1] + gap)
    step = 2 * base.denominator * rate.denominator
    moments = step * np.arange(int(borders[-1]) // step + 1)
    return np.searchsorted(borders, moments, side="left")


def _by_seeking(path: Path, numbers: list[int], size: tuple[int, int] | None) -> list[np.ndarray]:
    """Pictures of the frames with these numbers, from the key frame before the first on; fewer where they end."""
    times, _ = _times(*_identity(path))
    wanted = [int(times[n]) for n in numbers if n < len(times)]
    if len(wanted) < len(numbers):
        return _in_order(path, numbers, size)
    found: dict[int, np.ndarray] = {}
    last, missing = wanted[-1], set(wanted)
    av = need("av", "video", "read_frames")
    try:
        with _open(path) as (container, stream):
            container.seek(wanted[0], stream=stream)
            for frame in container.decode(stream):
                if frame.pts in missing:
                    found[frame.pts] = picture_of(path, frame, stream.sample_aspect_ratio or Fraction(1), size)
                    missing.discard(frame.pts)
                if not missing or frame.pts is None or frame.pts > last:
                    break
    except av.FFmpegError:  # no seeking in it, or damaged from here on
        pass
    return _in_order(path, numbers, size) if missing else [found[pts] for pts in wanted]


def _in_order(path: Path, numbers: list[int], size: tuple[int, int] | None) -> list[np.ndarray]:
    """The same, decoding from the first frame on."""
    found, wanted = {}, set(numbers)
    try:
        for number, (frame, aspect) in enumerate(_decoded(path)):
            if number in wanted:
                found[number] = picture_of(path, frame, aspect, size)
            if number >= numbers[-1]:
                break
    except ValueError:
        if not found:
            raise
    return [found[n] for n in numbers if n in found]


def _decoded(path: Path) -> Iterator[tuple[Any, Fraction]]:
    av = need("av", "video", "read_frames")
    with _open(path) as (container, stream):
        try:
            for frame in container.decode(stream):
                yield frame, stream.sample_aspect_ratio or Fraction(1)
        except av.FFmpegError as error:
            raise ValueError(f"read_frames: {path}: damaged: {error}") from None
