"""What report.check says of a video, in every form in which a pipeline returns one."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vdcore.integrations.check import clips_of, compare, twice

VIDEO = torch.rand(2, 4, 3, 6, 8, generator=torch.Generator().manual_seed(0))  # (B, T, C, H, W)


class Image:
    """As PIL's."""

    def __init__(self, frame):
        self.array = frame.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()

    @property
    def __array_interface__(self):
        return self.array.__array_interface__


FORMS = {
    "pt": (VIDEO, 2),
    "np": (VIDEO.permute(0, 1, 3, 4, 2).numpy(), 2),
    "pil": ([[Image(frame) for frame in clip] for clip in VIDEO], 2),
    "one clip of images": ([Image(frame) for frame in VIDEO[0]], 1),
    "clips of arrays": ([clip.permute(0, 2, 3, 1).numpy() for clip in VIDEO], 2),
    "one frame, in torch": (VIDEO[:, :1], 2),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "around", [lambda x: SimpleNamespace(frames=x), lambda x: (x,), lambda x: x], ids=["output", "tuple", "bare"]
)
def test_forms_of_videos(name, around):
    form, count = FORMS[name]
    clips = clips_of(around(form))
    assert len(clips) == count
    for clip, frames in zip(clips, VIDEO):
        expected = frames[: clip.shape[1]].transpose(0, 1)
        torch.testing.assert_close(clip, expected, rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    "result",
    [
        torch.randn(1, 16, 3, 6, 8),  # latents
        VIDEO * 2,
        torch.rand(2, 7),
        (torch.rand(4),),
        [],
        "text",
        SimpleNamespace(frames=[["a"]]),
        SimpleNamespace(sample=torch.rand(3)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_no_videos(result):
    assert clips_of(result) == []


def call(*results):
    left = iter(results)
    return lambda: next(left)


def test_what_a_viewer_sees(tmp_path):
    """The definition, frame by frame."""
    ours = VIDEO.clone()
    ours[1, 2] = (ours[1, 2] + 0.1).clamp(0, 1)
    host = twice(call(VIDEO, VIDEO), (), {})
    found = compare(host, twice(call(ours, ours), (), {}))
    squares = (ours.double() - VIDEO.double()).square()
    assert found.seen.frame == 6 and found.host_apart == 0
    assert found.seen.psnr == pytest.approx(-10 * math.log10(squares.mean()))
    assert found.seen.worst == pytest.approx(-10 * math.log10(squares[1, 2].mean()))
    assert 0.1 < found.seen.changed <= 1 / 8 and found.seen.levels in (25, 26)
    assert "in its worst frame (6)" in str(found)
    assert found.show(tmp_path / "same.png").is_file()
    same = compare(host, host)
    assert same.seen.psnr == math.inf and "the same in 8 bits" in str(same)


def test_hosts_that_differ_from_themselves():
    found = compare(twice(call(VIDEO, VIDEO * 0.5), (), {}), twice(call(VIDEO, VIDEO), (), {}))
    assert found.host_apart == pytest.approx(0.5 * VIDEO.max()) and "the host differs from itself" in str(found)


def test_clips_of_other_sizes_are_refused():
    one = twice(call(VIDEO, VIDEO), (), {})
    with pytest.raises(RuntimeError, match="check: the results have other shapes"):
        compare(one, twice(call(VIDEO[:, :3], VIDEO[:, :3]), (), {}))


def test_no_video_to_show(tmp_path):
    numbers = twice(call(torch.ones(2), torch.ones(2)), (), {})
    found = compare(numbers, numbers)
    assert found.seen is None
    with pytest.raises(ValueError, match="check: show needs a video"):
        found.show(tmp_path / "same.png")


def test_arrays_in_numpy_and_torch_agree():
    a = clips_of(VIDEO)
    b = clips_of(np.moveaxis(VIDEO.numpy(), 2, -1))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
