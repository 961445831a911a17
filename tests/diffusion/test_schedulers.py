"""Every scheduler that diffusers exports: stepped as pipelines step it, or refused by name."""

import inspect

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from vdcore.diffusion import Process, pyramid, sample, sample_frames, timesteps

SHAPE = (1, 4, 3, 8, 8)
CLASSES = sorted(
    {
        c.__name__: c
        for name in dir(diffusers)
        if name.endswith("Scheduler")
        and inspect.isclass(c := getattr(diffusers, name))
        and issubclass(c, SchedulerMixin)
    }.values(),
    key=lambda c: c.__name__,
)
SERVED = [
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
NEEDED = {  # arguments without defaults
    "AmusedScheduler": {"mask_token_id": 3},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
KARRAS = {"use_karras_sigmas": True}
CONFIGURED = {
    "SVD": (
        diffusers.EulerDiscreteScheduler,
        {"prediction_type": "v_prediction", "timestep_type": "continuous"} | KARRAS,
    ),
    "Wan": (
        diffusers.UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "Karras": (diffusers.EulerDiscreteScheduler, KARRAS),
    "Heun, Karras": (diffusers.HeunDiscreteScheduler, KARRAS),
    "no signal at the end": (diffusers.DDIMScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
}


def network(video, timestep):
    return 0.5 * video + 0.1 * torch.sin(3 * video)


def pipelines_loop(scheduler, noise, steps, mu=None):
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    video = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(video, t) if hasattr(scheduler, "scale_model_input") else video
        video = scheduler.step(network(given, t), t, video).prev_sample
    return video


def compare(new, generator, mu=None):
    noise = torch.randn(SHAPE, generator=generator)
    torch.manual_seed(0)
    found = sample(network, Process(new(), mu=mu), noise, steps=5)
    torch.manual_seed(0)
    assert torch.equal(found, pipelines_loop(new(), noise, 5, mu))


@pytest.mark.parametrize("made", CLASSES, ids=lambda c: c.__name__)
def test_every_class(made, generator):
    given = NEEDED.get(made.__name__, {})
    try:
        made(**given)
    except ImportError as error:
        pytest.skip(str(error))
    try:
        Process(made(**given))
    except (TypeError, ValueError) as error:
        assert str(error).startswith(made.__name__)
        assert made.__name__ not in SERVED
    else:
        compare(made, generator)


@pytest.mark.parametrize("name", CONFIGURED)
def test_configurations_of_models(name, generator):
    made, config = CONFIGURED[name]
    compare(lambda: made(**config), generator)


def test_shift_of_the_resolution(generator):
    def new():
        return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    with pytest.raises(ValueError, match=r"^FlowMatchEulerDiscreteScheduler: use_dynamic_shifting needs .*mu="):
        Process(new())
    with pytest.raises(ValueError, match=r"^FlowMatchEulerDiscreteScheduler: mu must be None"):
        Process(diffusers.FlowMatchEulerDiscreteScheduler(), mu=1.0)
    compare(new, generator, mu=1.3)
    assert not torch.equal(timesteps(Process(new(), mu=1.3), 5), timesteps(Process(new(), mu=0.5), 5))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (lambda: diffusers.CogVideoXDPMScheduler(), r"^CogVideoXDPMScheduler: step\(\) needs .*timestep_back"),
        (lambda: diffusers.UnCLIPScheduler(), r"^UnCLIPScheduler: step\(\) needs prev_timestep"),
        (lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), r"^UniPC\w+: prediction_type"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), r"^FlowMatch\w+: invert_sigmas"),
        (lambda: diffusers.EDMEulerScheduler(), r"^EDMEulerScheduler: a scheduler must have alphas_cumprod"),
    ],
)
def test_what_needs_more_is_refused_by_name(new, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Process(new())


@pytest.mark.parametrize("made", (diffusers.HeunDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler))
def test_a_generator_reaches_those_that_take_one(made):
    noise = torch.ones(SHAPE)

    def draw(seed):
        return sample(network, Process(made()), noise, 4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    takes = "generator" in inspect.signature(made.step).parameters
    assert torch.equal(draw(1), draw(2)) != takes


@pytest.mark.parametrize("name", ("Karras", "Heun, Karras", "SVD", "linear"))
def test_levels_are_the_schedulers_sigmas(name):
    """Timesteps between those of the table mean what the scheduler makes of them."""
    made, config = CONFIGURED.get(name, (diffusers.EulerDiscreteScheduler, {}))
    process = Process(made(**config))
    scheduler = process.scheduler
    scheduler.set_timesteps(7)
    alpha, sigma = process.level(scheduler.timesteps)
    torch.testing.assert_close(sigma / alpha, scheduler.sigmas[:-1].float(), rtol=2e-3, atol=0)
    still = torch.tensor([process.clean])
    assert [x.item() for x in process.level(still)] == [1, 0] and process.model_timestep(still).isfinite().all()


@pytest.mark.parametrize("name", ("Karras", "SVD"))
def test_held_frames_are_not_scaled(name, generator):
    made, config = CONFIGURED[name]
    noise, known = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    held, seen = torch.tensor((True, False, False)), []

    def denoise(video, timestep):
        seen.append(video)
        return network(video, timestep)

    found = sample(denoise, Process(made(**config)), noise, 4, held=held, known=known)
    assert len(seen) == 4 and all(torch.equal(video[:, :, 0], known[:, :, 0]) for video in seen)
    assert torch.equal(found[:, :, 0], known[:, :, 0]) and found.isfinite().all()
    assert seen[0].std() < 2  # the scheduler's own noise is 14 and more


@pytest.mark.parametrize(
    "made", (diffusers.HeunDiscreteScheduler, diffusers.KDPM2DiscreteScheduler, diffusers.PNDMScheduler)
)
def test_frames_step_once_where_the_scheduler_calls_twice(made, generator):
    config = {"skip_prk_steps": True} if made is diffusers.PNDMScheduler else {}
    process = Process(made(**config))
    levels = pyramid(process, 6, 3, lag=2)
    assert levels.shape[0] >= 6 + 4 + 1 and (levels.diff(dim=0) <= 0).all() and (levels[-1] == process.clean).all()
    clean = torch.randn(SHAPE, generator=generator)
    process = Process(process.scheduler, "sample")
    found = sample_frames(lambda video, t: clean, process, torch.randn(SHAPE, generator=generator), levels)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)
