"""What sampled videos are held against: clips of the source that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcore.metrics import (
    flow_consistency,
    mean_flow,
    optical_flow,
    temporal_fid,
    temporal_fid_estimate,
    temporal_flicker,
    warping_error,
)

# A model that learned the motion: its videos hold together nearly as real ones do, and they move as much. A still video
# would win the first alone.
MOST_ERROR, LEAST_MOTION, MOST_MOTION = 2.0, 0.5, 2.0
REAL_CLIPS = 96  # that samples are compared with; with 32 the mean error depends on which


@dataclass(frozen=True)
class Comparison:
    """Means over the videos of both sets.

    Args:
        samples, real: by measure: ``warping_error``, ``mean_flow`` (pixels per frame), ``flicker`` (VBench's score),
            ``residual`` and ``acceleration`` of the flow (pixels).
        temporal_fid: of the samples against the real clips.
        temporal_fid_of_real: of one half of the real clips against the other: what chance alone gives.
        temporal_fid_interval: 95 % of the first, without the bias of so few clips; None for fewer than 3.
    """

    samples: dict[str, float]
    real: dict[str, float]
    temporal_fid: float
    temporal_fid_of_real: float
    temporal_fid_interval: tuple[float, float] | None = None

    @property
    def error_ratio(self) -> float:
        """Warping error of the samples over that of real clips."""
        return self.samples["warping_error"] / max(self.real["warping_error"], 1e-12)

    @property
    def motion_ratio(self) -> float:
        """Mean flow of the samples over that of real clips."""
        return self.samples["mean_flow"] / max(self.real["mean_flow"], 1e-12)

    @property
    def moves_as_real(self) -> bool:
        """Warping error at most twice the real clips', at a mean flow between half and twice theirs."""
        return self.error_ratio <= MOST_ERROR and LEAST_MOTION <= self.motion_ratio <= MOST_MOTION


def measures(video: Tensor) -> dict[str, float]:
    """Means over a batch ``(B, C, T, H, W)`` in [0, 1]; flow is estimated once."""
    flow = optical_flow(video)
    consistency = flow_consistency(video, flow)
    values = {
        "warping_error": warping_error(video, flow),
        "mean_flow": mean_flow(video, flow),
        "flicker": temporal_flicker(video),
        "residual": consistency.residual,
        "acceleration": consistency.acceleration,
    }
    return {name: x.mean().item() for name, x in values.items()}


def against(real: Tensor) -> Callable[[Tensor], Comparison]:
    """Measures real clips ``(B, C, T, H, W)`` in [0, 1] once; what it returns compares samples with them."""
    half = len(real) // 2
    measured, chance = measures(real), temporal_fid(real[:half], real[half:]).item()

    def compare(samples: Tensor) -> Comparison:
        interval = None
        if min(len(real), len(samples)) > 2:
            estimate = temporal_fid_estimate(real, samples)
            interval = (estimate.low, estimate.high)
        return Comparison(measures(samples), measured, temporal_fid(real, samples).item(), chance, interval)

    return compare


@dataclass(frozen=True)
class Continued:
    """The second half of real clips as somebody goes on with the first, means over the clips.

    Args:
        warping_error: from the last frame of the first half on, along the *real* clips' flow. A still frame, which has
            none along its own flow, has one here.
        difference: squared, from the real frames.
    """

    warping_error: float
    difference: float


def measure_continued(real: Tensor, ours: Tensor, known: int) -> dict[str, Continued]:
    """What a model makes of the first ``known`` frames, beside what takes no model.

    Args:
        real, ours: ``(B, C, T, H, W)`` in [0, 1], alike in their first ``known`` frames.

    Returns:
        By name: ``real``, ``samples``, ``still frame`` (the last known one), ``first half again``, ``noise``.
    """
    T = real.shape[2]
    begin, flow = real[:, :, :known], optical_flow(real)
    rest = {
        "real": real[:, :, known:],
        "samples": ours[:, :, known:],
        "still frame": begin[:, :, -1:].expand_as(real[:, :, known:]),
        "first half again": begin[:, :, torch.arange(T - known) % known],
        "noise": torch.rand(real[:, :, known:].shape, generator=torch.Generator().manual_seed(0)),
    }
    along = (flow.forward[:, known - 1 :], flow.backward[:, known - 1 :])
    found = {}
    for name, frames in rest.items():
        error = warping_error(torch.cat((begin[:, :, -1:], frames), 2), along).mean().item()
        found[name] = Continued(error, (frames - rest["real"]).square().mean().item())
    return found


def goes_on_better(found: dict[str, Continued]) -> bool:
    """The samples' warping error along the real flow is below that of everything that takes no model."""
    plain = found.keys() - {"real", "samples"}
    return all(found["samples"].warping_error < found[name].warping_error for name in plain)
