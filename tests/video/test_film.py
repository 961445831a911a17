"""Windows of films by seeking are those of the film read whole, in every container; folders of pictures are films."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest

from vdcore.video import film, read_clip
from vdcore.video.film import count_frames, count_good, read_frames

CODECS = {
    "a.mp4": ("libx264", {"g": "7", "bf": "2"}),
    "open.mkv": ("libx264", {"g": "9", "bf": "3", "x264-params": "open-gop=1"}),
    "a.webm": ("libvpx-vp9", {"g": "8", "cpu-used": "8"}),
    "a.avi": ("mpeg4", {"g": "6"}),
    "a.gif": ("gif", {}),
}


def written(path, frames=31, codec=None, options=None, times=None):
    """A film whose frames are all different; ``times``: of the frames, in ms."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or "mpeg4", rate=10, options=options or {})
        stream.width, stream.height = 48, 32
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        random = np.random.default_rng(0)
        for t in range(frames):
            picture = np.full((32, 48, 3), 8 * t % 250, np.uint8)
            picture[8:24, t : t + 12] = random.integers(0, 255, 3)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def as_bytes(clip):
    return (clip * 255).round().byte().permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("name", CODECS)
def test_windows_are_those_of_the_whole(name, tmp_path):
    codec, options = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    path = written(tmp_path / name, codec=codec, options=options)
    whole = as_bytes(read_clip(path, size=(16, 24)))
    assert count_frames(path) == count_good(path) == len(whole) == 31
    for start in (0, 1, 6, 7, 8, 13, 19, 26):
        assert np.array_equal(read_frames(path, start, 5, (16, 24)), whole[start : start + 5]), start
    assert count_frames(path, stride=4) == 8
    assert np.array_equal(read_frames(path, 2, 5, (16, 24), stride=4), whole[8:25:4])
    for fps in (3, 10, 20, 7.5):
        by_time = as_bytes(read_clip(path, size=(16, 24), fps=fps))
        assert count_frames(path, fps=fps) == len(by_time)
        assert np.array_equal(read_frames(path, 1, 4, (16, 24), fps=fps), by_time[1:5])
    with pytest.raises(ValueError, match=r"4 of 5 frames from frame 27 on at stride 1"):
        read_frames(path, 27, 5)


def test_seeking_decodes_no_more_than_it_must(tmp_path, monkeypatch):
    path = written(tmp_path / "a.mp4", 200, "libx264", {"g": "10", "bf": "2"})
    count_frames(path)
    seen = []
    decode = av.container.InputContainer.decode

    def counting(self, *args, **kwargs):
        for frame in decode(self, *args, **kwargs):
            seen.append(frame.pts)
            yield frame

    class Container:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, *args):
            return counting(self.container, *args)

    enter = film._open.__enter__
    monkeypatch.setattr(film._open, "__enter__", lambda self: (lambda c, s: (Container(c), s))(*enter(self)))
    read_frames(path, 150, 5)
    assert 5 <= len(seen) <= 20


def test_a_varying_rate_by_time(tmp_path):
    times = [*range(0, 1000, 100), *range(1000, 1693, 33)]
    path = written(tmp_path / "a.mkv", len(times), times=times)
    for fps in (4, 8, 24):
        whole = as_bytes(read_clip(path, fps=fps))
        assert count_frames(path, fps=fps) == len(whole)
        assert np.array_equal(read_frames(path, 2, 4, fps=fps), whole[2:6])


def test_a_folder_of_pictures(tmp_path):
    for t in range(12):
        picture = av.VideoFrame.from_ndarray(np.full((16, 24, 3), 20 * t, np.uint8), format="rgb24").to_image()
        picture.save(tmp_path / f"frame{t}.png")
    clip = read_clip(tmp_path)
    assert clip.shape == (3, 12, 16, 24)
    assert clip.mean((0, 2, 3)).tolist() == pytest.approx([20 * t / 255 for t in range(12)], abs=0.005), "2 before 10"
    assert count_frames(tmp_path, stride=5) == 3
    assert np.array_equal(read_frames(tmp_path, 1, 2, stride=5), as_bytes(clip)[5:11:5])
    assert read_clip(tmp_path, frames=2, size=8, stride=3, start=2).shape == (3, 2, 8, 8)
    for function in (read_clip, count_frames):
        with pytest.raises(ValueError, match="pictures have no times, which fps needs"):
            function(tmp_path, fps=8)
    with pytest.raises(ValueError, match="2 of 3 frames from frame 10 on"):
        read_clip(tmp_path, frames=3, start=10)
    picture.resize((10, 10)).save(tmp_path / "frame12.png")
    with pytest.raises(ValueError, match="pictures of different sizes"):
        read_clip(tmp_path)


def test_another_file_of_the_same_name_has_another_index(tmp_path):
    path = written(tmp_path / "a.mkv", 9)
    assert count_frames(path) == 9
    os.utime(written(path, 14), (1, 1))
    assert count_frames(path) == 14 and len(read_frames(path, 10, 4)) == 4
