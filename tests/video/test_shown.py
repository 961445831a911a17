"""Clips are read as players show them: turned, mirrored, stretched, and by time."""

import struct
from fractions import Fraction
from itertools import product

import av
import numpy as np
import pytest
import torch

from vdcore.video import read_clip, real_windows, write_video

ONE = 1 << 16


def turn(path, a, b, c, d):
    """Writes the display matrix of an mp4's track."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44
    raw[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 32 * ONE, 0, 1 << 30)
    path.write_bytes(raw)


@pytest.fixture
def corner(tmp_path):
    """White in the left third of the upper half."""
    clip = torch.zeros(3, 2, 32, 96)
    clip[:, :, :16, :32] = 1
    return write_video(tmp_path / "a.mp4", clip)


MATRICES = [(s * ONE, 0, 0, t * ONE) for s, t in product((1, -1), repeat=2)]
MATRICES += [(0, s * ONE, t * ONE, 0) for s, t in product((1, -1), repeat=2)]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("sized", (False, True))
def test_eight_ways_to_show_a_picture(corner, matrix, sized):
    """Column x and row y go to column ``a x + c y`` and row ``b x + d y``."""
    turn(corner, *matrix)
    a, b, c, d = (n // ONE for n in matrix)
    shape = (32, 96) if a else (96, 32)
    expected = np.zeros(shape)
    for y, x in product(range(16), range(32)):
        column, row = a * x + c * y, b * x + d * y
        expected[row if b + d > 0 else row - 1, column if a + c > 0 else column - 1] = 1  # from the other end
    got = read_clip(corner, size=tuple(n // 2 for n in shape) if sized else None).mean((0, 1)).numpy()
    expected = expected.reshape(shape[0] // 2, 2, shape[1] // 2, 2).mean((1, 3)) if sized else expected
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 0.03


def test_a_slanted_picture_is_refused(corner):
    turn(corner, ONE, ONE // 2, -ONE // 2, ONE)
    with pytest.raises(ValueError, match=r"a\.mp4: is to be shown turned by other than quarter turns"):
        read_clip(corner)


@pytest.mark.parametrize("turned", (False, True))
def test_samples_that_are_not_square(tmp_path, turned):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, :32] = 255
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    if turned:
        turn(path, 0, ONE, -ONE, 0)
    got = read_clip(path)
    assert got.shape == (3, 3, 96, 64) if turned else (3, 3, 64, 96)
    white = got[:, :, :44].mean() if turned else got[..., :44].mean()
    assert white > 0.95 and got.mean() == pytest.approx(0.5, abs=0.03)
    assert read_clip(path, size=(96, 64) if turned else (64, 96)).sub(got).abs().mean() < 0.01


def varying(path, times):
    """Frames at times in ms, whose brightness is their time."""
    ms = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.time_base, stream.codec_context.time_base = "yuv420p", ms, ms
        for t in times:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), t // 8, np.uint8), format="rgb24")
            frame.pts, frame.time_base = t, ms
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seconds(clip):
    return clip.mean((0, 2, 3)) * 255 * 8 / 1000


def test_frames_by_time(tmp_path):
    times = [*range(0, 1000, 100), *range(1000, 2000, 33)]
    path = varying(tmp_path / "a.mkv", times)
    for fps in (3, 8, 24):
        expected = [min(times, key=lambda t: abs(t - 1000 * n / fps)) for n in range(1999 * fps // 1000 + 1)]
        got = seconds(read_clip(path, fps=fps))
        assert abs(len(got) - len(expected)) <= 1
        # Brightness is time in steps of 8 ms.
        torch.testing.assert_close(got[: len(expected)], torch.tensor(expected[: len(got)]) / 1000, rtol=0, atol=0.02)
    later = seconds(read_clip(path, frames=3, start=8, fps=8))
    torch.testing.assert_close(later, torch.tensor((1.0, 1.125, 1.25)), rtol=0, atol=0.03)
    assert real_windows(4, 16, 3, fps=8, paths=[path]).shape == (3, 3, 4, 16, 16)


@pytest.mark.parametrize(("fps", "count"), [(10, 20), (5, 10), (20, 40), (29.97, 60)])
def test_a_steady_rate_by_time(tmp_path, fps, count):
    path = write_video(tmp_path / "a.mp4", torch.linspace(0, 1, 20)[None, :, None, None].expand(3, -1, 16, 16), fps=10)
    whole, got = read_clip(path), read_clip(path, fps=fps)
    assert abs(got.shape[1] - count) <= 1
    if fps == 10:
        assert torch.equal(got, whole)
    if fps == 5:
        assert torch.equal(got, whole[:, ::2])


def test_fps_excludes_stride(tmp_path):
    for fps, stride in ((0, 1), (8, 2), (float("nan"), 1)):
        with pytest.raises(ValueError, match="read_clip: fps must be positive, and stride 1 with it"):
            read_clip(tmp_path / "any.mp4", fps=fps, stride=stride)


def test_a_stream_cut_short_says_how_many_frames_it_had(tmp_path):
    """An mp4 that says what is in it before the frames, as streams do, and loses its end."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(12):
            noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.warns(UserWarning, match=r"a\.mp4: ends after \d+ of its 12 frames"):
        got = read_clip(path)
    assert 1 <= got.shape[1] < 12
