"""Warping error, consistency and flicker on videos whose values are known."""

import pytest
import torch

from vdcore.metrics import flow_consistency, temporal_flicker, visible, warp, warping_error
from vdcore.metrics.flow import Flow
from vdcore.video import MovingShapes


@pytest.fixture(scope="module")
def scene():
    return MovingShapes(frames=8, size=(48, 48), radius=(6, 9), speed=(0.8, 2), pan=0.5).batch(range(8))


def test_a_still_video():
    video = MovingShapes(frames=1, size=(40, 40)).batch(3).video.expand(-1, -1, 6, -1, -1)
    assert warping_error(video).max() < 1e-6
    assert temporal_flicker(video).tolist() == [1, 1, 1]
    residual, acceleration = flow_consistency(video)
    assert residual.max() < 0.02 and acceleration.max() < 0.02


def test_warping_error_by_hand():
    """Two frames of 1x4 pixels that move one to the right; the last pixel leaves, one of the others changes by 0.6."""
    video = torch.zeros(1, 1, 2, 1, 4)
    video[0, 0, 0, 0] = torch.tensor((0.1, 0.2, 0.3, 0.4))
    video[0, 0, 1, 0] = torch.tensor((0.9, 0.1, 0.8, 0.3))
    forward = torch.zeros(1, 1, 2, 1, 4)
    forward[:, :, 0] = 1
    assert warping_error(video, (forward, -forward)).item() == pytest.approx(0.36 / 3)
    mask = torch.tensor((True, False, False, False)).view(1, 1, 1, 4)
    assert warping_error(video, (forward, -forward), mask=mask).item() == pytest.approx(0, abs=1e-12)
    nothing = torch.zeros_like(mask)  # then all pixels count; the last one sees the border, 0.3
    expected = (0.36 + 0.1**2) / 4
    assert warping_error(video, (forward, -forward), mask=nothing).item() == pytest.approx(expected)


def test_warping_error_is_the_mean_over_the_masked_pixels_of_each_pair(scene):
    flow = Flow(scene.flow, scene.flow_back)
    mask = visible(flow)
    frames = scene.video.transpose(1, 2)
    expected = []
    for b in range(len(frames)):
        pairs = []
        for t in range(scene.frames - 1):
            error = (frames[b, t] - warp(frames[b, t + 1], flow.forward[b, t])) ** 2
            pairs.append(error.mean(0)[mask[b, t]].mean())
        expected.append(torch.stack(pairs).mean())
    torch.testing.assert_close(warping_error(scene.video, flow), torch.stack(expected))


def test_the_true_flow_explains_a_scene_and_no_flow_does_not(scene):
    truth = warping_error(scene.video, (scene.flow, scene.flow_back))
    still = torch.zeros_like(scene.flow)
    assert (truth < 0.3 * warping_error(scene.video, (still, still))).all()
    assert (warping_error(scene.video) < 0.6 * warping_error(scene.video, (still, still))).all()
    exact = warping_error(scene.video, (scene.flow, scene.flow_back), mask=~scene.occluded)
    assert exact.mean() < 2e-3


def test_order_of_frames_matters(scene):
    shuffled = scene.video[:, :, torch.tensor((3, 0, 6, 2, 7, 4, 1, 5))]
    assert warping_error(shuffled).mean() > 2 * warping_error(scene.video).mean()
    assert temporal_flicker(shuffled).mean() < temporal_flicker(scene.video).mean()
    for more, less in zip(flow_consistency(shuffled), flow_consistency(scene.video)):
        assert more.mean() > 2 * less.mean()


def test_noise():
    video = torch.rand(2, 3, 6, 32, 32)
    # E |a - b| = 1/3 for independent uniform numbers, E (a - b)^2 = 1/6.
    torch.testing.assert_close(temporal_flicker(video), torch.full((2,), 2 / 3), atol=0.01, rtol=0)
    still = torch.zeros(2, 5, 2, 32, 32)
    torch.testing.assert_close(warping_error(video, (still, still)), torch.full((2,), 1 / 6), atol=0.01, rtol=0)
    assert warping_error(video).min() > 0.05  # whatever flow is found in it


def test_flicker_is_vbenchs_formula_on_eight_bits():
    video = torch.randint(256, (2, 3, 5, 8, 8)).float() / 255
    frames = (255 * video).round()
    mae = [(frames[:, :, t + 1] - frames[:, :, t]).abs().flatten(1).mean(1) for t in range(4)]
    expected = (255 - torch.stack(mae).mean(0)) / 255
    torch.testing.assert_close(temporal_flicker(video), expected)


def test_consistency_by_hand():
    video = torch.zeros(1, 1, 4, 9, 9)
    forward = torch.zeros(1, 3, 2, 9, 9)
    forward[0, :, 0] = torch.tensor((1.0, 1.5, 2.0))[:, None, None]
    residual, acceleration = flow_consistency(video, (forward, -forward))
    assert residual.item() == pytest.approx(0, abs=1e-6) and acceleration.item() == pytest.approx(0.5)
    backward = -forward
    backward[:, :, 1] += 0.3
    residual, _ = flow_consistency(video, (forward, backward))
    assert residual.item() == pytest.approx(0.3, abs=1e-6)
    assert flow_consistency(video[:, :, :2], (forward[:, :1], -forward[:, :1])).acceleration.item() == 0


def test_constant_velocity_has_no_acceleration(scene):
    residual, acceleration = flow_consistency(scene.video, (scene.flow, scene.flow_back))
    assert acceleration.max() < 0.05
    assert residual.max() < 0.25  # occlusions: the background leads there and is not led back


def test_gradients_are_not_kept():
    video = torch.rand(1, 3, 3, 16, 16, requires_grad=True)
    assert not any(x.requires_grad for x in (warping_error(video), temporal_flicker(video), *flow_consistency(video)))


def test_dtypes():
    video = MovingShapes(frames=4).batch(range(2)).video
    for dtype, off in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-3)):
        close = torch.testing.assert_close
        close(temporal_flicker(video.to(dtype)).float(), temporal_flicker(video), atol=off / 10, rtol=0)
        still = torch.zeros(2, 3, 2, 32, 32)
        ours, theirs = warping_error(video.to(dtype), (still, still)), warping_error(video, (still, still))
        close(ours.float(), theirs, atol=0, rtol=off)


def test_bad_masks():
    video, flow = torch.rand(1, 3, 4, 16, 16), torch.zeros(1, 3, 2, 16, 16)
    with pytest.raises(ValueError, match=r"warping_error: mask must be bool \(1, 3, 16, 16\), got torch.float32"):
        warping_error(video, (flow, flow), mask=torch.ones(1, 3, 16, 16))
