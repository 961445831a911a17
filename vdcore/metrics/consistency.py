"""Measures of one video: do its frames belong together?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vdcore.metrics._check import check_video
from vdcore.metrics.flow import Flow, as_flow, stays_inside, visible, warp

Both = Flow | tuple[Tensor, Tensor]


@torch.no_grad()
def warping_error(video: Tensor, flow: Both | None = None, *, mask: Tensor | None = None) -> Tensor:
    """Mean square difference between a frame and the next one brought back along the flow (Lai et al. 2018).

    ``E = mean_t  sum_p m_t(p) |x_t(p) - x_{t+1}(p + w_t(p))|^2 / (C sum_p m_t(p))`` with ``m`` the pixels that can be
    followed, see :func:`visible`. Lower is better; a still video has 0. A pair of frames in which nothing can be
    followed is compared in every pixel, so that noise, whose flow is never consistent, does not count as perfect.

    Args:
        video: ``(B, C, T, H, W)`` in [0, 1].
        flow: forward and backward, each ``(B, T-1, 2, H, W)`` in pixels; None: estimated by :func:`optical_flow` on
            the video itself.
        mask: ``(B, T-1, H, W)`` bool, where to compare, instead of :func:`visible`.

    Returns:
        ``(B,)``, squared units of the video.

    Raises:
        ValueError, TypeError: on other shapes, values outside [0, 1], integers.
    """
    video = check_video("warping_error", "video", video)
    forward, backward = as_flow("warping_error", video, flow)
    if mask is None:
        mask = visible(Flow(forward, backward))
    elif mask.shape != forward[:, :, 0].shape or mask.dtype != torch.bool:
        expected = tuple(forward[:, :, 0].shape)
        raise ValueError(f"warping_error: mask must be bool {expected}, got {mask.dtype} {tuple(mask.shape)}")
    kept = mask.to(video)
    kept = torch.where(kept.sum((-1, -2), keepdim=True) > 0, kept, torch.ones_like(kept))
    frames = video.transpose(1, 2)  # (B, T, C, H, W)
    error = (frames[:, :-1] - warp(frames[:, 1:], forward)).square().mean(2)
    return ((error * kept).sum((-1, -2)) / kept.sum((-1, -2))).mean(1)


class FlowConsistency(NamedTuple):
    """Both ``(B,)``, pixels; lower is better."""

    residual: Tensor  # there and back again: mean |w_t(p) + w'_t(p + w_t(p))|
    acceleration: Tensor  # along the path of a point: mean |w_{t+1}(p + w_t(p)) - w_t(p)|


@torch.no_grad()
def flow_consistency(video: Tensor, flow: Both | None = None) -> FlowConsistency:
    """Does the motion lead back to where it came from, and does it go on as it was?

    The residual is taken wherever the flow stays inside the picture, occlusions included: a video whose objects appear
    and vanish has a large one. The acceleration is taken where a point can be followed (:func:`visible`); 0 for fewer
    than 3 frames, and where nothing can be followed.

    Args:
        video: ``(B, C, T, H, W)`` in [0, 1].
        flow: forward and backward, each ``(B, T-1, 2, H, W)`` in pixels; None: estimated.
    """
    video = check_video("flow_consistency", "video", video)
    forward, backward = as_flow("flow_consistency", video, flow)
    residual = (forward + warp(backward, forward)).norm(dim=2)
    followed = visible(Flow(forward, backward))[:, :-1]
    change = (warp(forward[:, 1:], forward[:, :-1]) - forward[:, :-1]).norm(dim=2)
    return FlowConsistency(_mean(residual, stays_inside(forward)), _mean(change, followed))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


@torch.no_grad()
def temporal_flicker(video: Tensor) -> Tensor:
    """VBench's temporal flickering score (Huang et al. 2024): ``1 - mean |x_{t+1} - x_t|``, ``(B,)``, higher is better.

    VBench computes ``(255 - mean absolute difference) / 255`` on 8-bit frames, for prompts of static scenes only:
    motion lowers the score as flicker does, so compare videos of equal motion.

    Args:
        video: ``(B, C, T, H, W)`` in [0, 1].
    """
    video = check_video("temporal_flicker", "video", video)
    return 1 - video.diff(dim=2).abs().mean((1, 2, 3, 4))
