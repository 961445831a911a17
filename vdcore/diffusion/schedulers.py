"""The whole protocol of a diffusers scheduler, as pipelines drive it."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor


def refuse_unknown(scheduler: Any, mu: float | None) -> None:
    """Raises where a scheduler needs more than a pipeline of one model and one timestep at a time gives it.

    Raises:
        TypeError: if its class asks for more; it begins with the class's name, as does
        ValueError: if its configuration does.
    """
    name, config = type(scheduler).__name__, scheduler.config
    for method, known in (("set_timesteps", {"num_inference_steps"}), ("step", {"model_output", "timestep", "sample"})):
        if not hasattr(scheduler, method):
            raise TypeError(f"{name}: a scheduler must have {method}()")
        given = signature(getattr(scheduler, method)).parameters
        required = {key for key, p in given.items() if p.default is Parameter.empty and p.kind is not p.VAR_KEYWORD}
        # UnCLIP's default is the timestep before, whatever the steps are: its pipelines always pass it.
        more = (required - known) | ({"prev_timestep"} & given.keys())
        if more:
            raise TypeError(f"{name}: {method}() needs {', '.join(sorted(more))}, which only its own pipelines know")
    if getattr(config, "use_dynamic_shifting", False) and mu is None:
        raise ValueError(f"{name}: use_dynamic_shifting needs the shift of the resolution: Process(scheduler, mu=...)")
    if mu is not None and not getattr(config, "use_dynamic_shifting", False):
        raise ValueError(f"{name}: mu must be None without use_dynamic_shifting, got {mu}")
    if getattr(config, "invert_sigmas", False):
        raise ValueError(f"{name}: invert_sigmas must be False, got a flow whose timesteps count from noise to clean")


def begin(scheduler: Any, steps: int, mu: float | None, device: torch.device | str | None = None) -> Tensor:
    """Sets and returns the scheduler's timesteps: more than ``steps`` where it calls the model twice a step."""
    scheduler.set_timesteps(steps, device=device, **({} if mu is None else {"mu": mu}))
    return scheduler.timesteps


def first_video(scheduler: Any, noise: Tensor) -> Tensor:
    """Noise as strong as the scheduler's own coordinates have it; after :func:`begin`."""
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


def model_input(scheduler: Any, video: Tensor, timestep: Tensor) -> Tensor:
    """What the model is given, ``alpha x + sigma e``; to be called once before every step."""
    return scheduler.scale_model_input(video, timestep) if hasattr(scheduler, "scale_model_input") else video


def step(
    scheduler: Any, output: Tensor, timestep: Tensor, video: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """The video after a step. The generator reaches the schedulers that take one."""
    takes = generator is not None and "generator" in signature(scheduler.step).parameters
    return scheduler.step(output, timestep, video, **({"generator": generator} if takes else {})).prev_sample


def clipped(scheduler: Any, clean: Tensor) -> Tensor:
    """A prediction of the clean video as the scheduler itself would step from it."""
    config = getattr(scheduler, "config", None)
    if getattr(config, "thresholding", False) and hasattr(scheduler, "_threshold_sample"):
        return scheduler._threshold_sample(clean)
    if getattr(config, "clip_sample", False):
        limit = getattr(config, "clip_sample_range", 1.0)
        return clean.clamp(-limit, limit)
    return clean


def ratios(scheduler: Any, timestep: Tensor) -> Tensor:
    """``sigma / alpha`` of the scheduler's timesteps, which may lie between those of its table; float64.

    As the scheduler itself interpolates: by logarithms where it goes from sigmas to timesteps, linearly where it goes
    the other way. Timesteps below the table's first have no noise.
    """
    timestep = timestep.double()
    if is_continuous(scheduler):
        return (4 * timestep).exp()  # Karras et al. 2022: the network is told log(sigma) / 4
    square = scheduler.alphas_cumprod.to(timestep)
    table = ((1 - square) / square).sqrt()
    at = timestep.clamp(0, len(table) - 1)
    low = at.floor().long()
    high, part = (low + 1).clamp(max=len(table) - 1), at - low
    a, b = table[low], table[high]
    if any(getattr(scheduler.config, f"use_{kind}_sigmas", False) for kind in ("karras", "exponential", "beta")):
        between = (a.log() * (1 - part) + b.log() * part).exp()
    else:
        between = a * (1 - part) + b * part
    # Without a part of the next one: of a table that ends in pure noise, infinity times 0 would be NaN.
    return torch.where(timestep <= -0.5, 0.0, torch.where(part == 0, a, between))


def is_continuous(scheduler: Any) -> bool:
    """Whether timesteps are ``log(sigma) / 4``, as Stable Video Diffusion's are."""
    config = scheduler.config
    return getattr(config, "timestep_type", None) == "continuous" and config.prediction_type == "v_prediction"
