"""The noise process: diffusers' own formulas where it has them, the definition where it has none."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from vdcore.diffusion import KINDS, Process, hold_timesteps

SHAPE = (2, 3, 5, 4, 4)


def process_of(kind, predicts=None, scheduler=DDIMScheduler, **config):
    if kind == "flow":
        return Process(FlowMatchEulerDiscreteScheduler(**config), predicts)
    return Process(scheduler(prediction_type=kind, clip_sample=False, **config), predicts)


def pair(generator):
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("scheduler", (DDPMScheduler, DDIMScheduler))
def test_noise_and_velocity_are_those_of_diffusers(scheduler, generator):
    process = process_of("v_prediction", scheduler=scheduler, beta_schedule="scaled_linear")
    clean, noise = pair(generator)
    t = torch.tensor((3, 871))
    theirs = process.scheduler.add_noise(clean, noise, t)
    torch.testing.assert_close(process.add_noise(clean, noise, t.float()), theirs)
    torch.testing.assert_close(process.target(clean, noise, t.float()), process.scheduler.get_velocity(clean, noise, t))


def test_flow_is_a_straight_line(generator):
    process = process_of("flow")
    clean, noise = pair(generator)
    t = torch.tensor((250.0, 1000.0))
    noisy = process.add_noise(clean, noise, t)
    torch.testing.assert_close(noisy[0], 0.75 * clean[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy[1], noise[1])
    torch.testing.assert_close(process.target(clean, noise, t), noise - clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predicts", KINDS)
def test_conversions_of_a_perfect_prediction(kind, predicts, generator):
    """Whatever a denoiser predicts, x, e and the scheduler's prediction follow from it and z, for a level per frame."""
    process = process_of(kind, predicts)
    clean, noise = pair(generator)
    t = torch.tensor((20.0, 200.0, 500.0, 800.0, 950.0)).expand(2, -1)
    noisy = process.add_noise(clean, noise, t)
    output = process.target(clean, noise, t)
    found = process.clean_and_noise(output, noisy, t)
    torch.testing.assert_close(found[0], clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], noise, rtol=1e-3, atol=1e-3)
    expected = process_of(kind).target(clean, noise, t)
    torch.testing.assert_close(process.output_for_scheduler(output, noisy, t), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_weight_makes_it_the_schedulers_error(kind, generator):
    """A prediction of x that is off by d: weighted, the loss is that of the scheduler's prediction made from it."""
    process = process_of(kind, "sample")
    clean, noise = pair(generator)
    t = torch.tensor((300.0, 700.0))
    noisy = process.add_noise(clean, noise, t)
    wrong = clean + 0.1 * torch.randn(SHAPE, generator=generator)
    expected = ((process.output_for_scheduler(wrong, noisy, t) - process_of(kind).target(clean, noise, t)) ** 2).mean()
    loss = process.loss(lambda video, timestep: wrong, clean, noise, t)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_frames_have_levels_of_their_own(generator):
    process = process_of("epsilon")
    clean, noise = pair(generator)
    t = torch.tensor((0.0, 10.0, 300.0, 999.0, process.clean)).expand(2, -1)
    noisy = process.add_noise(clean, noise, t)
    for i in range(4):
        alone = process.add_noise(clean[:, :, i : i + 1], noise[:, :, i : i + 1], t[:, i])
        assert torch.equal(noisy[:, :, i : i + 1], alone)
    assert torch.equal(noisy[:, :, 4], clean[:, :, 4])
    assert not torch.equal(noisy[:, :, 0], clean[:, :, 0])  # a discrete timestep 0 is noisy


@pytest.mark.parametrize("kind", KINDS)
def test_held_frames_are_given_clean_and_not_scored(kind, generator):
    process = process_of(kind)
    clean, noise = pair(generator)
    held = torch.tensor(((True, True, False, False, False), (False, False, False, False, True)))
    seen = {}

    def denoise(video, timestep):
        seen.update(video=video, timestep=timestep)
        offset = torch.where(held, 1e3, 0.5)[:, None, :, None, None]
        return process.target(clean, noise, hold_timesteps(t, held, process.clean)) + offset

    t = torch.tensor((400.0, 600.0))
    loss = process.loss(denoise, clean, noise, t, held)
    torch.testing.assert_close(loss, torch.tensor(0.25), rtol=1e-4, atol=0)
    here = held[:, None, :, None, None].expand(SHAPE)
    assert torch.equal(seen["video"][here], clean[here])
    assert not torch.equal(seen["video"][~here], clean[~here])
    assert seen["timestep"].shape == (2, 5) and (seen["timestep"][held] == 0).all()
    assert (seen["timestep"][0, 2:] == 400).all()


def test_a_step_to_the_same_timestep_changes_nothing(generator):
    process = process_of("v_prediction")
    noisy, output = pair(generator)
    t = torch.full((2, 5), 500.0)
    to = t.clone()
    to[:, 3] = 400
    moved = process.move(output, noisy, t, to)
    assert torch.equal(moved[:, :, :3], noisy[:, :, :3]) and torch.equal(moved[:, :, 4], noisy[:, :, 4])
    assert not torch.equal(moved[:, :, 3], noisy[:, :, 3])


def test_errors():
    with pytest.raises(ValueError, match=r"predicts must be one of .* got 'noise'"):
        process_of("flow", "noise")
    with pytest.raises(TypeError, match="scheduler must have alphas_cumprod or match flows"):
        broken = EulerDiscreteScheduler()
        del broken.alphas_cumprod
        Process(broken)
