"""What a diffusers scheduler means: how noisy a frame is, what the model predicts of it, one step to less noise."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from vdcore.diffusion import schedulers

Kind = Literal["epsilon", "sample", "v_prediction", "flow"]
KINDS = get_args(Kind)
LEAST = 1e-6  # below this much of what a prediction is divided by, the frame holds nothing to learn from


class Denoise(Protocol):
    """A denoiser: noisy video ``(B, C, T, H, W)`` and timesteps ``(B,)`` or ``(B, T)`` to a prediction of its shape."""

    def __call__(self, video: Tensor, timestep: Tensor, /, **conditions: Any) -> Tensor: ...


def per_frame(values: Tensor) -> Tensor:
    """``(B,)`` or ``(B, T)`` so that it broadcasts to a video ``(B, C, T, H, W)``."""
    return values[:, None, None, None, None] if values.ndim == 1 else values[:, None, :, None, None]


class Process:
    """The noise process of a diffusers scheduler, for videos whose frames may each have a timestep of their own.

    A noisy frame is ``z = alpha x + sigma e`` of the clean frame ``x`` and noise ``e``. Every prediction is a
    combination of the two: ``e`` (epsilon), ``x`` (sample), ``alpha e - sigma x`` (v, Salimans and Ho 2022), ``e - x``
    (flow, Lipman et al. 2023). So ``z`` and any prediction give ``x`` and ``e``, and these every other prediction.

    Args:
        scheduler: of diffusers; one with ``alphas_cumprod`` (DDPM, DDIM, Euler, ...) or a flow matching one.
        predicts: what the denoiser predicts; ``None``: what the scheduler expects of it. A denoiser may predict the
            clean video while a flow matching scheduler steps (Li and He 2025): :meth:`output_for_scheduler` converts.
        mu: the shift of schedulers with ``use_dynamic_shifting``, which pipelines take from the resolution.

    Raises:
        TypeError, ValueError: if the scheduler needs more than a pipeline's plain loop gives it; the message begins
            with the name of its class.
    """

    def __init__(self, scheduler: Any, predicts: Kind | None = None, *, mu: float | None = None) -> None:
        name, config = type(scheduler).__name__, scheduler.config
        flow_sigmas = bool(getattr(config, "use_flow_sigmas", False))
        if "FlowMatch" not in name and not hasattr(scheduler, "alphas_cumprod"):
            raise TypeError(f"{name}: a scheduler must have alphas_cumprod or match flows")
        schedulers.refuse_unknown(scheduler, mu)
        self._flows = flow_sigmas or "FlowMatch" in name
        kind: Any = "flow_prediction" if "FlowMatch" in name else config.prediction_type
        self.steps_on: Kind = "flow" if kind == "flow_prediction" and self._flows else kind
        self.scheduler, self.mu = scheduler, mu
        self.train_timesteps = int(config.num_train_timesteps)
        self.predicts: Kind = self.steps_on if predicts is None else predicts
        for what, kind in ((f"{name}: prediction_type", self.steps_on), ("Process: predicts", self.predicts)):
            if kind not in KINDS:
                raise ValueError(f"{what} must be one of {', '.join(KINDS)}, got {kind!r}")

    @property
    def clean(self) -> float:
        """The timestep of a frame without noise: 0 of a flow, -1 of discrete timesteps, whose 0 is noisy already, and
        minus infinity of timesteps that are logarithms."""
        if self._flows:
            return 0.0
        return -math.inf if schedulers.is_continuous(self.scheduler) else -1.0

    def model_timestep(self, timestep: Tensor) -> Tensor:
        """Timesteps as the model takes them: never below the least that it is trained on."""
        least = 0.0
        if self.clean == -math.inf:
            low = self.scheduler.config.sigma_min
            low = low if low is not None else (1 / float(self.scheduler.alphas_cumprod[0]) - 1) ** 0.5
            least = math.log(low) / 4
        return timestep.clamp(min=least)

    def level(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` of timesteps of any shape, float32."""
        if self._flows:
            sigma = timestep.double() / self.train_timesteps
            return (1 - sigma).float(), sigma.float()
        ratio = schedulers.ratios(self.scheduler, timestep)
        square = 1 / (1 + ratio**2)
        return square.sqrt().float(), (1 - square).sqrt().float()

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """``alpha x + sigma e``; timesteps ``(B,)`` or ``(B, T)``."""
        alpha, sigma = map(per_frame, self.level(timestep))
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What a perfect denoiser would return."""
        of_clean, of_noise = _parts(self.predicts, *map(per_frame, self.level(timestep)))
        return of_clean * clean + of_noise * noise

    def clean_and_noise(self, output: Tensor, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The ``x`` and ``e`` that a denoiser's output claims. Where a frame holds no trace of one of them (``e`` at no
        noise, for a denoiser that predicts ``x``), the result for it is finite and means nothing."""
        alpha, sigma = map(per_frame, self.level(timestep))
        of_clean, of_noise = _parts(self.predicts, alpha, sigma)
        det = _away_from_zero(alpha * of_noise - sigma * of_clean)
        return (of_noise * noisy - sigma * output) / det, (alpha * output - of_clean * noisy) / det

    def output_for_scheduler(self, output: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
        """The prediction that ``scheduler.step`` expects, from what the denoiser predicts."""
        if self.predicts == self.steps_on:
            return output
        of_clean, of_noise = _parts(self.steps_on, *map(per_frame, self.level(timestep)))
        clean, noise = self.clean_and_noise(output, noisy, timestep)
        return of_clean * clean + of_noise * noise

    def move(self, output: Tensor, noisy: Tensor, timestep: Tensor, to: Tensor) -> Tensor:
        """The deterministic step ``alpha' x + sigma' e`` of every frame from its timestep to another of its own.

        With one timestep for all frames this is DDIM's step (Song et al. 2021, eta 0) and the Euler step of a flow.
        Frames whose timestep stays are returned as they are.

        Args:
            timestep, to: ``(B,)`` or ``(B, T)``.
        """
        clean, noise = self.clean_and_noise(output, noisy, timestep)
        return torch.where(per_frame(timestep == to), noisy, self.add_noise(clean, noise, to))

    def loss_weight(self, timestep: Tensor, floor: float = 0.3) -> Tensor:
        """Factor of the squared error of ``predicts`` that makes it the squared error of the scheduler's prediction.

        Args:
            floor: least value of what it divides by, so that nearly clean frames, of which little is left to learn, do
                not outweigh all others: below 0.1 they are most of the gradient.
        """
        if self.predicts == self.steps_on:
            return torch.ones_like(timestep, dtype=torch.float32)
        alpha, sigma = self.level(timestep)
        determinants = []
        for kind in (self.steps_on, self.predicts):
            of_clean, of_noise = _parts(kind, alpha, sigma)
            determinants.append((alpha * of_noise - sigma * of_clean).abs())
        return (determinants[0] / determinants[1].clamp(min=floor)) ** 2

    def loss(
        self,
        denoise: Denoise,
        clean: Tensor,
        noise: Tensor,
        timestep: Tensor,
        held: Tensor | None = None,
        count: Tensor | float | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Mean squared error of the denoiser over the frames that are not held.

        Args:
            clean, noise: ``(B, C, T, H, W)``.
            timestep: ``(B,)``, or ``(B, T)``: independent noise per frame under a joint denoiser (Chen et al. 2024).
            held: ``(B, T)`` bool: frames that the denoiser is given clean, as a condition.
            count: values that the mean is taken over, where several processes have parts of the video; None: those of
                this call that are not held.
            conditions: passed on to the denoiser.
        """
        if held is not None:
            timestep = hold_timesteps(timestep, held, self.clean)
        noisy = self.add_noise(clean, noise, timestep)
        error = (denoise(noisy, self.model_timestep(timestep), **conditions) - self.target(clean, noise, timestep)) ** 2
        weight = per_frame(self.loss_weight(timestep))
        if held is not None:
            weight = torch.where(per_frame(held), 0.0, weight)
        if count is not None:
            return (weight * error).sum() / count
        return (weight * error).mean() if held is None else (weight * error).sum() / values(clean, held)


def values(clean: Tensor, held: Tensor | None) -> Tensor | float:
    """Of a video ``(B, C, T, H, W)`` those in frames that are not held ``(B, T)``."""
    if held is None:
        return clean.numel()
    B, C, _, H, W = clean.shape
    return (~held).sum().clamp(min=1) * (C * H * W)


def hold_timesteps(timestep: Tensor, held: Tensor, clean: float) -> Tensor:
    """``(B, T)``: the given timesteps, ``(B,)`` or ``(B, T)``, and ``clean`` where a frame is held."""
    if timestep.ndim == 1:
        timestep = timestep[:, None]
    return torch.where(held, torch.full((), clean, dtype=timestep.dtype, device=timestep.device), timestep)


def _parts(kind: Kind, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """How much of ``x`` and of ``e`` is in a prediction."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha), "flow": (-one, one)}[kind]


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < LEAST, torch.full_like(x, LEAST).copysign(x), x)
