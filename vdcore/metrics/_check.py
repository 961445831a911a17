"""What all measures ask of their arguments, in one wording."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLACK = 1e-3  # rounding of whoever scaled the video


def check_video(user: str, name: str, video: Any, *, frames: int = 2) -> Tensor:
    """A batch of clips in [0, 1], as float32 at least, without its history of gradients."""
    if not isinstance(video, Tensor):
        raise TypeError(f"{user}: {name} must be a tensor, got {type(video).__name__}")
    if not video.is_floating_point():
        raise TypeError(f"{user}: {name} must be floating point in [0, 1], got {video.dtype}")
    if video.ndim != 5 or video.shape[1] not in (1, 3) or 0 in video.shape:
        raise ValueError(
            f"{user}: {name} must be (B, C, T, H, W) with C 1 or 3 and nothing empty, got {tuple(video.shape)}"
        )
    if video.shape[2] < frames:
        raise ValueError(f"{user}: {name} must have at least {frames} frames, got {video.shape[2]}")
    video = video.detach()
    video = video if video.dtype == torch.float64 else video.float()
    low, high = video.aminmax()
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(f"{user}: {name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}")
    return video


def check_flow(user: str, name: str, flow: Any, video: Tensor) -> Tensor:
    """Pixels ``(B, T-1, 2, H, W)`` beside a video."""
    if not isinstance(flow, Tensor):
        raise TypeError(f"{user}: {name} must be a tensor, got {type(flow).__name__}")
    B, _, T, H, W = video.shape
    if tuple(flow.shape) != (B, T - 1, 2, H, W):
        raise ValueError(f"{user}: {name} must be (B, T-1, 2, H, W) = {(B, T - 1, 2, H, W)}, got {tuple(flow.shape)}")
    return flow.detach().to(video)
