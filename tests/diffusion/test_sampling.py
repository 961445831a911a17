"""Sampling loops against those of diffusers, written out."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from vdcore.diffusion import Process, guided, make_sampler, pyramid, sample, sample_frames, timesteps

SHAPE = (2, 3, 6, 4, 4)
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim-v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddpm": lambda: DDPMScheduler(),
    "dpm-solver": lambda: DPMSolverMultistepScheduler(),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
DETERMINISTIC = ("ddim", "ddim-v", "flow")


def network(video, timestep, label=None):
    """Any function of everything it is given, frames included."""
    if timestep.ndim == 1:
        timestep = timestep[:, None].expand(-1, video.shape[2])
    level = (timestep / 1000)[:, None, :, None, None]
    out = torch.tanh(video + 0.3 * video.roll(1, 2) + 0.1 * video.mean((2, 3, 4), keepdim=True)) * (0.5 + level)
    return out if label is None else out * (1 + label.view(-1, 1, 1, 1, 1))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_is_the_loop_of_a_pipeline(name, generator):
    scheduler, noise = SCHEDULERS[name](), torch.randn(SHAPE, generator=generator)
    scheduler.set_timesteps(7)
    expected, random = noise, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        output = network(expected, t.float().expand(2))
        expected = scheduler.step(output, t, expected, generator=random).prev_sample
    done = []
    random = torch.Generator().manual_seed(1)
    found = sample(network, Process(SCHEDULERS[name]()), noise, 7, generator=random, on_step=done.append)
    assert torch.equal(found, expected)
    assert done == list(range(1, 8))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_frames_at_one_timestep_are_the_joint_sampler(name, generator):
    noise = torch.randn(SHAPE, generator=generator)
    process = Process(SCHEDULERS[name]())
    levels = pyramid(process, 7, SHAPE[2], lag=0)
    assert levels.shape == (8, 6)
    torch.testing.assert_close(sample_frames(network, process, noise, levels), sample(network, process, noise, 7))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_one_frame_after_another(name, generator):
    """With a lag of all steps, every frame is denoised with the ones before it clean and those after it pure noise."""
    process, noise = Process(SCHEDULERS[name]()), torch.randn(SHAPE, generator=generator)
    found = sample_frames(network, process, noise, pyramid(process, 4, SHAPE[2], lag=4))
    schedule, video = timesteps(process, 4), noise.clone()
    for frame in range(SHAPE[2]):
        for now, then in pairwise(schedule):
            t = torch.full((2, SHAPE[2]), float(schedule[0]))
            t[:, :frame], t[:, frame] = process.clean, now
            to = t.clone()
            to[:, frame] = then
            video = process.move(network(video, process.model_timestep(t)), video, t, to)
    torch.testing.assert_close(found, video)


def test_pyramid_is_monotone_and_ends_clean():
    process = Process(SCHEDULERS["ddim"]())
    levels = pyramid(process, 5, 4, lag=2)
    assert levels.shape == (5 + 2 * 3 + 1, 4)
    assert (levels[0] == levels[0, 0]).all() and (levels[-1] == process.clean).all()
    assert (levels.diff(dim=0) <= 0).all() and (levels.diff(dim=1) >= 0).all()
    assert torch.equal(levels[:-2, 0], levels[2:, 1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_held_frames_stay_and_condition_the_others(name, generator):
    noise, known = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    held = torch.tensor((True, False, False, True, False, False))
    seen = []

    def denoise(video, timestep):
        seen.append((video, timestep))
        return network(video, timestep)

    def draw(known):
        random = torch.Generator().manual_seed(3)
        return sample(denoise, Process(SCHEDULERS[name]()), noise, 5, held=held, known=known, generator=random)

    found = draw(known)
    assert torch.equal(found[:, :, held], known[:, :, held])
    assert all(torch.equal(video[:, :, held], known[:, :, held]) and (t[:, held] == 0).all() for video, t in seen)
    other = known.clone()
    other[:, :, ~held] = float("nan")
    assert torch.equal(draw(other), found)  # of what is known only the held frames are read
    other[:, :, 0] += 1
    assert not torch.equal(draw(other)[:, :, 1], found[:, :, 1])


@pytest.mark.parametrize("name", ("ddim", "flow"))
def test_held_frames_per_sample_under_a_clean_prediction(name, generator):
    """A denoiser that predicts x divides by the noise, of which held frames have none: nothing may become NaN."""
    process = Process(SCHEDULERS[name](), "sample")
    known, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    held = torch.zeros(2, 6, dtype=torch.bool)
    held[0, 0] = held[1, 5] = True
    found = sample(lambda video, t: known, process, noise, 6, held=held, known=known)
    torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", (*SCHEDULERS,))
def test_the_mean_of_the_last_predictions(name, generator):
    """With frames held: those come out as they are known."""
    process, noise, guesses = Process(SCHEDULERS[name](), "sample"), torch.randn(SHAPE, generator=generator), []
    known, held = torch.randn(SHAPE, generator=generator), torch.arange(6) < 2

    def denoise(video, timestep):
        guesses.append(network(video, timestep))
        return guesses[-1]

    given = {"held": held, "known": known, "generator": torch.Generator().manual_seed(1)}
    found = sample(denoise, process, noise, 5, average=3, **given)
    assert len(guesses) == 5 and torch.equal(found[:, :, :2], known[:, :, :2])
    expected = torch.stack(guesses[-3:]).mean(0)
    torch.testing.assert_close(found[:, :, 2:], expected[:, :, 2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("ddim", "flow"))
def test_a_share_of_the_noise_is_new_in_every_step(name, generator):
    """By the formula, step for step; what is drawn anew has the strength of what it replaces."""
    process, noise, steps, share = (
        Process(SCHEDULERS[name](), "sample"),
        torch.randn(SHAPE, generator=generator),
        4,
        0.3,
    )
    random, levels = torch.Generator().manual_seed(1), timesteps(process, steps)
    expected = noise
    for now, then in pairwise(levels):
        clean = network(expected, now.expand(2))
        if then == levels[-1]:
            expected = clean
            break
        (alpha, sigma), (alpha_then, sigma_then) = process.level(now), process.level(then)
        e = (expected - alpha * clean) / sigma
        e = (1 - share) ** 0.5 * e + share**0.5 * torch.randn(SHAPE, generator=random)
        expected = alpha_then * clean + sigma_then * e

    def draw(seed, fresh):
        return sample(network, process, noise, steps, fresh=fresh, generator=torch.Generator().manual_seed(seed))

    if name == "flow":  # DDIM's last step of diffusers ends at its first alpha, not at 1
        torch.testing.assert_close(draw(1, share), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(draw(1, share), draw(2, share)) and torch.equal(draw(1, 0.0), draw(2, 0.0))
    true = torch.zeros(2, 3, 6, 40, 40)
    strong = torch.randn(true.shape, generator=generator)
    seen = []

    def perfect(video, timestep):
        seen.append((video.std(), process.level(timestep)[1][0]))
        return true

    sample(perfect, process, strong, steps, fresh=share, generator=torch.Generator().manual_seed(3))
    assert all(std == pytest.approx(float(sigma), rel=0.03) for std, sigma in seen)


@pytest.mark.parametrize("clip", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}], ids=str)
def test_guesses_are_clipped_as_the_scheduler_clips_them(clip, generator):
    """What is averaged, and what noise is drawn anew around, lies where the scheduler steps from."""
    process, noise = Process(DDIMScheduler(**clip)), torch.randn(SHAPE, generator=generator)
    for given in ({"average": 3}, {"fresh": 0.9}, {"average": 2, "fresh": 1.0}):
        drawn = sample(lambda video, t: -2 * video, process, noise, 5, **given, generator=torch.Generator())
        assert drawn.abs().max() <= 1


def test_guidance_in_one_batch(generator):
    noise, calls = torch.randn(SHAPE, generator=generator), []
    label, null = torch.tensor((0.5, -0.25)), torch.zeros(2)

    def denoise(video, timestep, label):
        calls.append(len(video))
        return network(video, timestep, label)

    both = guided(denoise, 3.0, label=(label, null))
    t = torch.tensor((700.0, 300.0))
    uncond, cond = network(noise, t, null), network(noise, t, label)
    torch.testing.assert_close(both(noise, t), uncond + 3 * (cond - uncond))
    assert calls == [4]
    torch.testing.assert_close(guided(denoise, 1.0, label=(label, null))(noise, t), cond)
    per_frame = t[:, None].expand(-1, SHAPE[2])
    torch.testing.assert_close(both(noise, per_frame), uncond + 3 * (cond - uncond))


def test_drawing_tells_positions_from_the_first(generator):
    told = []

    def denoise(video, timestep, positions):
        told.append(positions)
        return network(video, timestep)

    draw = make_sampler(
        denoise, Process(SCHEDULERS["flow"]()), (1, 3, 4, 4), 2, generator=generator, tell_positions=True
    )
    assert draw(torch.tensor((40, 44, 48))).shape == (1, 3, 3, 4, 4)
    assert all(torch.equal(positions, torch.tensor((0, 4, 8))) for positions in told) and told


def test_errors(generator):
    process, noise = Process(SCHEDULERS["flow"]()), torch.randn(SHAPE, generator=generator)
    with pytest.raises(ValueError, match="held and known must be given together"):
        sample(network, process, noise, 2, held=torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"known must be \(2, 3, 6, 4, 4\), as noise, got \(2, 3, 5, 4, 4\)"):
        sample(network, process, noise, 2, held=torch.ones(6, dtype=torch.bool), known=noise[:, :, :5])
    with pytest.raises(ValueError, match="average must be from 1 to 2, the calls of the model, got 3"):
        sample(network, process, noise, 2, average=3)
    with pytest.raises(ValueError, match=r"fresh must be from 0 to 1, .* got 0.5 with DPMSolverMultistepScheduler"):
        sample(network, Process(SCHEDULERS["dpm-solver"]()), noise, 2, fresh=0.5)
    with pytest.raises(ValueError, match=r"fresh must be from 0 to 1, .* got 1.5 with FlowMatchEuler"):
        sample(network, process, noise, 2, fresh=1.5)
    with pytest.raises(ValueError, match=r"levels must be \(K \+ 1, T = 6\), got \(3, 5\)"):
        sample_frames(network, process, noise, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="never rise"):
        sample_frames(network, process, noise, torch.arange(12.0).view(2, 6))
    with pytest.raises(ValueError, match="lag must be at least 0, got -1"):
        pyramid(process, 4, 6, lag=-1)
