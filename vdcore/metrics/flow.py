"""Optical flow between consecutive frames, warping along it, and where it can be believed.

A flow is ``(B, T-1, 2, H, W)``, pixels, x then y; a positive y points down.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.extras import need
from vdcore.metrics._check import check_flow, check_video

LEAST_SIDE = 128  # pixels; smaller frames are enlarged for the estimator, whose patches are 8 pixels wide


class Flow(NamedTuple):
    """Motion in both directions, each ``(B, T-1, 2, H, W)``."""

    forward: Tensor  # from frame t to t+1, on the pixels of t
    backward: Tensor  # from frame t+1 to t, on the pixels of t+1


def optical_flow(video: Tensor) -> Flow:
    """Flow by dense inverse search (Kroeger et al. 2016), OpenCV's, in both directions.

    Args:
        video: ``(B, C, T, H, W)`` in [0, 1].
    """
    video = check_video("optical_flow", "video", video)
    cv2 = need("cv2", "video", "optical_flow")
    B, C, T, H, W = video.shape
    weights = video.new_tensor((0.299, 0.587, 0.114) if C == 3 else (1.0,))  # ITU-R BT.601
    gray = torch.einsum("bcthw,c->bthw", video, weights).clamp(0, 1)
    zoom = max(math.ceil(LEAST_SIDE / min(H, W)), 1)
    if zoom > 1:
        gray = F.interpolate(gray, scale_factor=zoom, mode="bicubic", align_corners=False).clamp(0, 1)
    pictures = gray.mul(255).round().to(torch.uint8).cpu().numpy()
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    estimator.setFinestScale(0 if zoom == 1 else int(math.log2(zoom)))
    forward = np.empty((B, T - 1, zoom * H, zoom * W, 2), np.float32)
    backward = np.empty_like(forward)
    for b in range(B):
        for t in range(T - 1):
            forward[b, t] = estimator.calc(pictures[b, t], pictures[b, t + 1], None)
            backward[b, t] = estimator.calc(pictures[b, t + 1], pictures[b, t], None)

    def shrink(flow: np.ndarray) -> Tensor:
        found = torch.from_numpy(flow).movedim(-1, 2)
        if zoom > 1:
            found = F.avg_pool2d(found.flatten(0, 1), zoom).unflatten(0, (B, T - 1)) / zoom
        return found.to(video)

    return Flow(shrink(forward), shrink(backward))


def as_flow(user: str, video: Tensor, flow: Flow | tuple[Tensor, Tensor] | None) -> Flow:
    """The given flow, checked, or an estimated one."""
    if flow is None:
        return optical_flow(video)
    if isinstance(flow, Tensor) or len(flow) != 2:
        raise TypeError(f"{user}: flow must be the pair (forward, backward), got {type(flow).__name__}")
    forward, backward = (check_flow(user, f"flow[{i}]", x, video) for i, x in enumerate(flow))
    return Flow(forward, backward)


def warp(frames: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """Samples ``frames`` at ``p + flow(p)``; what lies outside is taken from the border.

    Args:
        frames: ``(..., C, H, W)``.
        flow: ``(..., 2, H, W)``.
        mode: of the interpolation, ``"bilinear"`` or ``"bicubic"``.

    Returns:
        ``(..., C, H, W)``, differentiable in both.
    """
    H, W = frames.shape[-2:]
    x = torch.arange(W, dtype=flow.dtype, device=flow.device)
    y = torch.arange(H, dtype=flow.dtype, device=flow.device)[:, None]
    # grid_sample counts from -1 to 1 between the outer edges of the first and the last pixel.
    at = torch.stack((2 * (flow[..., 0, :, :] + x + 0.5) / W - 1, 2 * (flow[..., 1, :, :] + y + 0.5) / H - 1), -1)
    lead = frames.shape[:-3]
    out = F.grid_sample(
        frames.reshape(-1, *frames.shape[-3:]), at.reshape(-1, H, W, 2), mode, "border", align_corners=False
    )
    return out.reshape(*lead, *out.shape[1:])


def visible(flow: Flow) -> Tensor:
    """Where the point seen in frame t can be followed into frame t+1: ``(B, T-1, H, W)`` bool.

    With ``w`` the forward flow and ``w'`` the backward flow where it leads, a pixel is kept if

    - it stays inside the picture;
    - the two agree: ``|w + w'|^2 <= 0.01 (|w|^2 + |w'|^2) + 0.5`` (Sundaram et al. 2010), else it is occluded;
    - it lies on no motion boundary: ``|grad w_x|^2 + |grad w_y|^2 <= 0.01 |w|^2 + 0.002``.

    The constants, in pixels, are those of Ruder et al. (2016), which Lai et al. (2018) use.
    """
    forward, backward = flow
    back = warp(backward, forward)
    there, here = _square(back), _square(forward)
    consistent = _square(forward + back) <= 0.01 * (here + there) + 0.5
    dx, dy = _gradient(forward)
    smooth = _square(dx) + _square(dy) <= 0.01 * here + 0.002
    return consistent & smooth & stays_inside(forward)


def stays_inside(flow: Tensor) -> Tensor:
    """Where a pixel's center is led to another's, or between some: ``(B, T-1, H, W)`` bool."""
    H, W = flow.shape[-2:]
    x = flow[..., 0, :, :] + torch.arange(W, device=flow.device)
    y = flow[..., 1, :, :] + torch.arange(H, device=flow.device)[:, None]
    return (x >= 0) & (x <= W - 1) & (y >= 0) & (y <= H - 1)


def _square(flow: Tensor) -> Tensor:
    """``|w|^2``, ``(B, T-1, H, W)``."""
    return flow.square().sum(-3)


def _gradient(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences along x and y, 0 in the last column and row."""
    return F.pad(flow.diff(dim=-1), (0, 1)), F.pad(flow.diff(dim=-2), (0, 0, 0, 1))


def mean_flow(video: Tensor, flow: Flow | tuple[Tensor, Tensor] | None = None) -> Tensor:
    """How much moves: the mean length of the forward flow, pixels per frame, ``(B,)``.

    A still video has the best of warping errors, flicker and consistency: read those beside this.

    Args:
        video: ``(B, C, T, H, W)`` in [0, 1].
        flow: forward and backward, each ``(B, T-1, 2, H, W)``; None: estimated by :func:`optical_flow`.
    """
    video = check_video("mean_flow", "video", video)
    return as_flow("mean_flow", video, flow).forward.norm(dim=-3).mean((1, 2, 3))
