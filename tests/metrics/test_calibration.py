"""What the measures say of motion and disturbances of known size, and how sure a temporal FID is."""

import pytest
import torch

import metric_table
from vdcore.metrics import (
    flow_consistency,
    mean_flow,
    optical_flow,
    temporal_fid,
    temporal_fid_estimate,
    visible,
    warping_error,
)
from vdcore.metrics.flow import Flow


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def scenes(speed, count=4):
    return metric_table.scenes(speed, count, frames=5)


def known(scene):
    return Flow(scene.flow, scene.flow_back)


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0, 4.0])
def test_measures_of_known_motion(speed):
    """Estimated flow moves as much as there is motion, and the measures on it are near those on the known one."""
    scene = scenes(speed)
    estimated, truth = optical_flow(scene.video), known(scene)
    moved = mean_flow(scene.video, truth)
    assert moved.mean() > 0.3 * speed
    torch.testing.assert_close(mean_flow(scene.video, estimated).mean(), moved.mean(), rtol=0.25, atol=0.05)
    exact, ours = (warping_error(scene.video, flow).mean() for flow in (truth, estimated))
    assert exact < 2e-4 and ours < 3 * exact + 1e-4
    assert flow_consistency(scene.video, truth).acceleration.mean() < 0.05, "motion is constant"
    assert flow_consistency(scene.video, estimated).acceleration.mean() < 0.05 + 0.15 * speed


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
def test_noise_adds_its_variance_twice(sigma, generator):
    """Warped noise is averaged over up to four pixels: between once and twice the variance comes on top."""
    scene = scenes(1.0)
    noisy = (scene.video * 0.6 + 0.2 + sigma * torch.randn(scene.video.shape, generator=generator)).clamp(0, 1)
    added = warping_error(noisy, known(scene)) - warping_error(scene.video * 0.6 + 0.2, known(scene))
    assert ((added > 1.2 * sigma**2) & (added < 2.05 * sigma**2)).all()


def test_flicker_of_brightness_shows_by_its_square():
    """Every other frame is brighter by 0.04: the error is that squared, wherever a point can be followed."""
    scene = scenes(1.0)
    video = scene.video * 0.6 + 0.2
    flickering = video + 0.04 * (torch.arange(video.shape[2]) % 2)[:, None, None]
    mask = visible(known(scene))
    plain, found = (warping_error(x, known(scene), mask=mask) for x in (video, flickering))
    torch.testing.assert_close(found - plain, torch.full((4,), 0.04**2), rtol=0.15, atol=0)


def changing(count, generator, step=0.02):
    """Tiny clips whose frames change by independent steps, more in some clips than in others."""
    size = step * (0.5 + torch.rand(count, 1, 1, 1, 1, generator=generator))
    return 0.5 + (size * torch.randn(count, 1, 6, 3, 3, generator=generator)).cumsum(2).clamp(-0.5, 0.5)


@pytest.mark.parametrize("step", [0.02, 0.026])
def test_the_interval_holds_the_distance_of_many_clips(step, generator):
    """In at least 75 of 100 draws of 24 clips against 32: 95 is the normal distribution's, which the distance of so few
    has not. The uncorrected value is too large."""
    many = [changing(4000, generator, s) for s in (0.02, step)]
    truth = temporal_fid(*many, grid=1).item()
    estimates = [
        temporal_fid_estimate(changing(32, generator), changing(24, generator, step), grid=1) for _ in range(100)
    ]
    held = sum(e.low <= truth <= e.high for e in estimates)
    assert held >= 75
    mean = sum(e.corrected for e in estimates) / 100
    biased = sum(e.value for e in estimates) / 100
    assert abs(mean - truth) < 0.5 * (biased - truth) and biased > truth


def test_an_estimate_says_what_it_is_of(generator):
    real, fake = changing(5, generator), changing(4, generator)
    found = temporal_fid_estimate(real, fake, grid=1)
    assert found.value == temporal_fid(real, fake, grid=1).item() and found.clips == (5, 4)
    assert "5 real clips, 4 others" in str(found)
    with pytest.raises(ValueError, match="fake must have at least 3 clips, got 2"):
        temporal_fid_estimate(real, fake[:2], grid=1)
