"""Sources of clips: files and folders, drawn from a generator alone."""

import pytest
import torch

from vdcore.diffusion.data import Clips, Scenes, find_videos, source_of
from vdcore.video.files import write_video
from vdcore.video.scenes import MovingShapes


def ramp(frames, level=0.1):
    """Frame t is grey ``level + t / 32``, its left half a little darker."""
    video = (level + torch.arange(frames) / 32)[None, :, None, None].expand(3, -1, 16, 16).clone()
    video[..., :8] -= 0.03
    return video.clamp(0, 1)


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "b.mp4", ramp(12))
    write_video(tmp_path / "inner" / "a.gif", ramp(7, 0.5))
    (tmp_path / "notes.txt").write_text("no video")
    return tmp_path


def test_windows_of_files(folder, generator):
    source = Clips([folder], frames=4, size=(8, 8), stride=1)
    assert [path.name for path in source.paths] == ["b.mp4", "a.gif"]
    assert source.ends.tolist() == [9, 13]
    clips = source.batch(400, generator)
    assert clips.shape == (400, 3, 4, 8, 8) and clips.min() >= 0 and clips.max() <= 1
    steps = clips.mean((1, 3, 4)).diff(dim=1)
    assert (steps - 1 / 32).abs().max() < 0.012  # four frames that follow one another
    first = clips[:, :, 0].mean((1, 2, 3))
    assert (first > 0.45).float().mean() == pytest.approx(4 / 13, abs=0.08)
    darker_left = clips[..., :3].mean((1, 2, 3, 4)) < clips[..., 5:].mean((1, 2, 3, 4))
    assert darker_left.float().mean() == pytest.approx(0.5, abs=0.08)


def test_stride(folder, generator):
    clips = Clips([folder / "b.mp4"], frames=4, size=(8, 8), stride=3).batch(5, generator)
    assert (clips.mean((1, 3, 4)).diff(dim=1) - 3 / 32).abs().max() < 0.012


@pytest.mark.parametrize("kind", ("scenes", "clips"))
def test_a_source_is_its_description_and_the_generator(kind, folder):
    if kind == "scenes":
        source = Scenes(MovingShapes(frames=4, size=(8, 12), objects=1))
    else:
        source = Clips([folder / "b.mp4", folder / "inner"], frames=4, size=(8, 12))
    again = source_of(source.describe())
    batches = [s.batch(3, torch.Generator().manual_seed(5)) for s in (source, again)]
    assert torch.equal(*batches)
    assert not torch.equal(batches[0], source.batch(3, torch.Generator().manual_seed(6)))


def test_bad_files_do_not_stop_a_folder(folder, generator):
    whole = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "page.mp4").write_text("<html>404</html>")
    with pytest.warns(UserWarning, match="left out 4 bad or short files") as caught:
        source = Clips([folder], frames=8, size=(8, 8))
    said = str(caught[0].message).splitlines()
    assert len(caught) == 1 and len(said) == 5
    for name in ("cut.mp4", "empty.mp4", "page.mp4", "a.gif"):
        assert sum(name in line for line in said) == 1
    assert [path.name for path in source.paths] == ["b.mp4"]
    assert [path.name for path, _ in source.left_out] == ["cut.mp4", "empty.mp4", "a.gif", "page.mp4"]
    again = source_of(source.describe())
    batches = [s.batch(3, torch.Generator().manual_seed(5)) for s in (source, again)]
    assert torch.equal(*batches)


def test_frames_by_time(folder, generator):
    """Clips are written at 8 frames per second."""
    source = Clips([folder / "b.mp4"], frames=3, size=(8, 8), fps=2)
    assert source.describe()["fps"] == 2
    clips = source_of(source.describe()).batch(5, generator)
    assert (clips.mean((1, 3, 4)).diff(dim=1) - 4 / 32).abs().max() < 0.012


def test_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.mp4: no such file or folder"):
        find_videos([folder / "nowhere.mp4"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no video"):
        find_videos([empty])
    with pytest.raises(FileNotFoundError, match="no paths given"):
        find_videos([])
    with pytest.raises(ValueError, match=r"a.gif: 7 frames at stride 1, wanted 8"):
        Clips([folder], frames=8, size=(8, 8), strict=True)
    with pytest.raises(ValueError, match=r"a.gif: 7 frames at stride 1, wanted 8"):
        Clips([folder / "b.mp4", folder / "inner" / "a.gif"], frames=8, size=(8, 8))
    with pytest.raises(ValueError, match=r"none of 2 files is good:\n.*b.mp4: 12 frames .*\n.*a.gif: 7 frames "):
        Clips([folder], frames=20, size=(8, 8))
    with pytest.raises(ValueError, match=r"notes.txt: not a video file"):
        Clips([folder / "notes.txt"], frames=2, size=(8, 8))
    with pytest.raises(ValueError, match="kind must be scenes or clips, got 'songs'"):
        source_of({"kind": "songs"})
