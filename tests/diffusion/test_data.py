"""Sources of clips: files and folders, drawn from a generator alone."""

import av
import cv2
import numpy as np
import pytest
import torch

from vdcore.diffusion.data import Clips, Scenes, find_videos, source_of
from vdcore.video.files import write_video
from vdcore.video.film import count_good
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
    source = Clips([folder], frames=4, size=(8, 8), stride=1, mirror=True)
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


@pytest.fixture
def long_clip(tmp_path):
    """1,200 frames that tell their own number, more than are kept in memory."""
    video = torch.zeros(3, 1200, 16, 32)
    for t in range(1200):
        for bit in range(11):
            video[:, t, :, 2 * bit : 2 * bit + 2] = float(t >> bit & 1)
    return write_video(tmp_path / "long.mp4", video)


def numbers(clips):
    """Of windows of that clip: the number of every frame ``(B, T)``; mirrored ones are turned back."""
    bits = clips.mean((1, 3))[:, :, None].repeat(1, 1, 2, 1)
    bits[:, :, 1] = bits[:, :, 1].flip(-1)
    found = (bits[..., :22].unflatten(-1, (11, 2)).mean(-1) > 0.5).long() @ (2 ** torch.arange(11))
    steps = found.diff(dim=1)
    plain = (steps[:, :, 0] == 1).all(1)
    return torch.where(plain[:, None], found[:, :, 0], found[:, :, 1])


def test_a_long_film_is_sought(long_clip, generator):
    source = Clips([long_clip], frames=5, size=(16, 32), mirror=True)
    state = generator.get_state()
    found = numbers(source.batch(12, generator))
    generator.set_state(state)
    assert found[:, 0].tolist() == [start for _, start, _ in source._draw(12, generator)]
    assert (found.diff(dim=1) == 1).all() and not source.kept, "nothing is kept of a long film"


def test_windows_are_mirrored_where_that_is_asked_for(long_clip, generator):
    """White bars at the left of a frame tell its number."""
    given = {"frames": 4, "size": (16, 32)}
    state = generator.get_state()
    plain = Clips([long_clip], **given).batch(12, generator)
    generator.set_state(state)
    source = Clips([long_clip], **given, mirror=True)
    mirrored = source.batch(12, generator)
    same = [torch.equal(a, b) for a, b in zip(plain, mirrored)]
    assert any(same) and not all(same)
    assert all(torch.equal(a, b if alike else b.flip(-1)) for a, b, alike in zip(plain, mirrored, same))
    assert plain[..., 22:].max() < 0.5, "nothing is mirrored unasked"
    assert source_of(source.describe()).mirror


def test_workers_change_nothing(long_clip, folder):
    """Nor does decoding ahead, nor going on from the middle."""
    given = {"frames": 4, "size": (16, 32)}
    plain, random = Clips([folder], **given), torch.Generator().manual_seed(3)
    expected = [plain.batch(3, random) for _ in range(4)]
    source, random = Clips([folder], **given, workers=1), torch.Generator().manual_seed(3)
    assert source.describe() == plain.describe()
    for i in range(4):
        if i == 2:  # as after a checkpoint
            source, state = Clips([folder], **given), random.get_state()
            random = torch.Generator()
            random.set_state(state)
        assert torch.equal(source.batch(3, random), expected[i])
        ahead = torch.Generator()
        ahead.set_state(random.get_state())
        source.prefetch(3, ahead)
        assert bool(source.under_way) == (i < 2), "but for what is kept"


def test_a_film_that_ends_early_gives_what_it_has(tmp_path, generator):
    """It says 60 frames and has some: windows come from these, the same ones every time, and it is told once."""
    path = cut_short(tmp_path / "cut.mp4", frames=60)
    source = Clips([tmp_path], frames=4, size=(16, 16))
    assert source.clips[0].count == 60
    with pytest.warns(UserWarning, match=r"cut\.mp4: \d+ good frames at stride 1, fewer than it says") as caught:
        first = source.batch(20, generator)
        source.batch(20, generator)
    assert len(caught) == 1 and first.shape == (20, 3, 4, 16, 16)
    generator.manual_seed(0)
    batches = []
    for _ in range(2):
        again = Clips([tmp_path], frames=4, size=(16, 16))
        with pytest.warns(UserWarning, match="fewer than it says"):
            batches.append(again.batch(8, torch.Generator().manual_seed(1)))
    assert torch.equal(*batches)
    with pytest.raises(ValueError, match="fewer than it says"):
        Clips([tmp_path], frames=4, size=(16, 16), strict=True).batch(8, generator)
    assert path.exists()


def test_a_film_with_too_few_good_frames_is_passed_over(tmp_path, generator):
    good = count_good(cut_short(tmp_path / "a.mp4", frames=60))
    write_video(tmp_path / "b.mp4", ramp(12)[:, torch.arange(good + 5) % 12])
    source = Clips([tmp_path], frames=good + 1, size=(8, 8))
    assert len(source.clips) == 2
    with pytest.warns(UserWarning, match=r"a\.mp4: \d+ good frames .*another one is drawn in its place") as caught:
        found = source.batch(30, generator)
    assert found.shape[2] == good + 1 and len(caught) == 1
    with pytest.raises(ValueError, match=r"a\.mp4: \d+ good frames at stride 1, wanted"):
        Clips([tmp_path], frames=good + 1, size=(8, 8), strict=True).batch(30, generator)


def test_folders_of_pictures_among_videos(folder, generator):
    for t in range(6):
        picture = torch.full((8, 8, 3), 0.9).mul(255).byte().numpy()
        (folder / "shot").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "shot" / f"{t}.png"), picture)
    (folder / "cover.png").write_bytes((folder / "shot" / "0.png").read_bytes())
    assert [path.name for path in find_videos([folder])] == ["b.mp4", "a.gif", "shot"]
    bright = Clips([folder / "shot"], frames=4, size=(8, 8)).batch(2, generator)
    assert (bright - 0.9).abs().max() < 0.01


def cut_short(path, frames):
    """An mp4 that says what is in it before the frames, and loses its end."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        random = np.random.default_rng(0)
        for _ in range(frames):
            picture = random.integers(0, 255, (32, 32, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 4])
    return path
