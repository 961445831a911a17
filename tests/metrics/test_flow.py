"""Optical flow, warping and the occlusion test, against scenes whose motion is known."""

import pytest
import torch

from vdcore.metrics import Flow, mean_flow, optical_flow, visible, warp
from vdcore.video import MovingShapes


def shifted(dx: int, dy: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    big = torch.rand(1, 3, size + 8, size + 8)
    return big[..., 4:-4, 4:-4], big[..., 4 - dy : 4 - dy + size, 4 - dx : 4 - dx + size]


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, 2), (-3, 1)])
def test_warping_brings_the_next_frame_back(dx, dy):
    """b(p + d) = a(p): content that moves by (dx, dy) is found again, wherever it is still in the picture."""
    a, b = shifted(dx, dy)
    flow = torch.tensor((dx, dy)).float()[None, :, None, None].expand(1, 2, 12, 12)
    inner = slice(3, -3)
    torch.testing.assert_close(warp(b, flow)[..., inner, inner], a[..., inner, inner])


def test_warping_between_pixels_and_outside():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0] = 0.25
    expected = (ramp + 0.25).clamp(max=7)
    torch.testing.assert_close(warp(ramp, flow), expected)
    flow[:, 0] = 100
    assert (warp(ramp, flow) == 7).all()


def test_estimated_flow_of_moving_shapes():
    scene = MovingShapes(frames=6, size=(64, 64), radius=(8, 12), speed=(0.5, 2), pan=1.0, occluders=0).batch(range(6))
    found = optical_flow(scene.video)
    error = (found.forward - scene.flow).norm(dim=2)[~scene.occluded]
    back = (found.backward - scene.flow_back).norm(dim=2)[~scene.disoccluded]
    size = scene.flow.norm(dim=2).mean()
    assert size > 0.5
    assert error.mean() < 0.25 * size and back.mean() < 0.25 * size


@pytest.mark.parametrize("size", [(24, 24), (32, 48), (130, 200)])
def test_a_moving_picture_of_any_size(size):
    """The whole picture moves by (2, -1) a frame."""
    H, W = size
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12), (H + 10, W + 10), mode="bicubic").clamp(0, 1)
    frames = [noise[..., 5 + t : 5 + t + H, 5 - 2 * t : 5 - 2 * t + W] for t in range(3)]
    found = optical_flow(torch.stack(frames, 2))
    assert found.forward.shape == (1, 2, 2, H, W)
    inner = found.forward[..., 6:-6, 6:-6].mean((-1, -2))
    torch.testing.assert_close(inner, torch.tensor((2.0, -1.0)).expand(1, 2, 2), atol=0.2, rtol=0)
    torch.testing.assert_close(found.backward[..., 6:-6, 6:-6].mean((-1, -2)), -inner, atol=0.2, rtol=0)


def test_a_still_video_does_not_move():
    video = MovingShapes(frames=1).batch(2).video.expand(-1, -1, 5, -1, -1)
    found = optical_flow(video)
    assert found.forward.abs().max() < 0.02 and mean_flow(video).max() < 0.02
    assert visible(found).all()


def test_mean_flow_by_hand():
    video = torch.zeros(2, 3, 3, 4, 4)
    forward = torch.zeros(2, 2, 2, 4, 4)
    forward[0, 0, 0] = 3
    forward[0, 0, 1] = 4
    flow = (forward, -forward)
    assert mean_flow(video, flow).tolist() == [2.5, 0.0]  # 5 pixels in one of two steps


def test_the_occlusion_test_by_hand():
    def flows(forward, backward) -> Flow:
        return Flow(*(torch.tensor(w)[:, None, None].expand(1, 1, 2, 9, 9).clone() for w in (forward, backward)))

    middle = (0, 0, 4, 4)
    assert visible(flows((2.0, 0.0), (-2.0, 0.0)))[middle]
    # |w + w'|^2 <= 0.01 (|w|^2 + |w'|^2) + 0.5: off by 0.7 pixels passes, off by 0.8 does not.
    assert visible(flows((2.0, 0.0), (-2.0, 0.7)))[middle]
    assert not visible(flows((2.0, 0.0), (-2.0, 0.8)))[middle]
    # The last two columns are led out of the picture.
    assert visible(flows((2.0, 0.0), (-2.0, 0.0)))[0, 0, 4].tolist() == [True] * 7 + [False] * 2
    # A jump of the flow is a motion boundary, a gentle slope is none.
    jump = flows((0.0, 0.0), (0.0, 0.0))
    jump.forward[..., 0, :, 5:] = 0.4
    jump.backward[..., 0, :, :] = -0.2
    assert visible(jump)[0, 0, 4].tolist() == [True] * 4 + [False] + [True] * 3 + [False]  # 8.4 is outside
    slope = flows((0.0, 0.0), (0.0, 0.0))
    slope.forward[..., 0, :, :] = 0.04 * (torch.arange(9) - 4)
    assert visible(slope)[0, 0, 4, 1:-1].all()


def test_true_flow_marks_what_is_truly_occluded():
    scene = MovingShapes(frames=8, size=(48, 48), radius=(7, 9), speed=(1.5, 3), objects=2).batch(range(8))
    kept = visible(Flow(scene.flow, scene.flow_back))
    assert kept[scene.occluded].float().mean() < 0.15
    assert kept[~scene.occluded].float().mean() > 0.9


def test_bad_input():
    video = torch.rand(1, 3, 4, 16, 16)
    flow = torch.zeros(1, 3, 2, 16, 16)
    with pytest.raises(ValueError, match=r"mean_flow: video must lie in \[0, 1\], got values from -0.9"):
        mean_flow(2 * video - 1)
    with pytest.raises(TypeError, match="must be floating point"):
        optical_flow((255 * video).byte())
    with pytest.raises(ValueError, match=r"video must be \(B, C, T, H, W\) with C 1 or 3"):
        optical_flow(video.transpose(1, 2))
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        optical_flow(video[:, :, :1])
    with pytest.raises(ValueError, match=r"\[0, 1\], got values from nan"):
        optical_flow(video * torch.nan)
    with pytest.raises(TypeError, match=r"flow must be the pair \(forward, backward\), got Tensor"):
        mean_flow(video, flow)
    with pytest.raises(ValueError, match=r"flow\[1\] must be \(B, T-1, 2, H, W\)"):
        mean_flow(video, (flow, flow[:, :2]))
