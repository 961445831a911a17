"""A loss that asks motion to go on as it was, and the differentiable flow that it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.metrics.flow import warp


def lucas_kanade(
    a: Tensor,
    b: Tensor,
    *,
    levels: int = 3,
    iterations: int = 4,
    sigma: float = 1.5,
    ridge: float = 1e-3,
    step: float = 1.0,
) -> Tensor:
    """Flow from a to b that a gradient can go through: pyramidal, iterative Lucas-Kanade (1981; Bouguet 2001).

    On every level of a pyramid, coarse to fine, ``w += (G + ridge I)^-1 sum_window grad a (a - b(p + w))`` with
    ``G = sum_window grad a grad a^T``, the window a Gaussian, b sampled by cubic interpolation, and no threshold
    anywhere: once continuously differentiable in both pictures. Right for motions of a few pixels per frame in small,
    textured pictures; where there is no texture the ridge leaves the flow of the coarser level as it is.

    Args:
        a, b: ``(N, C, H, W)`` in [0, 1].
        levels: of the pyramid, fewer where a side would fall below 8 pixels.
        iterations: on every level.
        sigma: of the window, pixels of the level.
        ridge: squared units of the pictures; smaller trusts fainter texture.
        step: about the longest step of one iteration, pixels of the level; steps are bent towards it, not cut off.

    Returns:
        ``(N, 2, H, W)``, pixels, x then y.
    """
    if a.ndim != 4 or a.shape != b.shape or 0 in a.shape:
        raise ValueError(
            f"lucas_kanade: a and b must be (N, C, H, W), equal, not empty, got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if levels < 1 or iterations < 1 or not sigma > 0 or not ridge > 0 or not step > 0:
        raise ValueError("lucas_kanade: levels and iterations must be at least 1; sigma, ridge and step positive")
    pyramid = [(a, b)]
    while len(pyramid) < levels and min(pyramid[-1][0].shape[-2:]) >= 16:
        pyramid.append(tuple(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in pyramid[-1]))  # type: ignore[arg-type]
    flow = a.new_zeros(len(a), 2, *pyramid[-1][0].shape[-2:])
    kernel = _gaussian(sigma, a)
    for a, b in reversed(pyramid):
        if flow.shape[-2:] != a.shape[-2:]:
            flow = 2 * F.interpolate(flow, size=a.shape[-2:], mode="bilinear", align_corners=False)
        dx, dy = _derivatives(a)
        xx, xy, yy = (_blur(product, kernel) for product in (dx * dx, dx * dy, dy * dy))
        xx, yy = xx + ridge, yy + ridge
        determinant = xx * yy - xy * xy
        for _ in range(iterations):
            error = (a - warp(b, flow, "bicubic")) * _inside(flow)
            ex, ey = _blur(dx * error, kernel), _blur(dy * error, kernel)
            move = torch.cat((yy * ex - xy * ey, xx * ey - xy * ex), 1) / determinant
            flow = flow + move / (1 + move.square().sum(1, keepdim=True) / step**2).sqrt()
    return flow


def _inside(flow: Tensor) -> Tensor:
    """1 where the flow stays in the picture and 0 where it leaves it, ``(N, 1, H, W)``, smooth over about a pixel."""
    H, W = flow.shape[-2:]
    x = flow[:, :1] + torch.arange(W, dtype=flow.dtype, device=flow.device)
    y = flow[:, 1:] + torch.arange(H, dtype=flow.dtype, device=flow.device)[:, None]
    sides = (x + 0.5, W - 0.5 - x, y + 0.5, H - 0.5 - y)
    return torch.stack([(4 * side).sigmoid() for side in sides]).prod(0)


def _gaussian(sigma: float, like: Tensor) -> Tensor:
    radius = max(round(2 * sigma), 1)
    x = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    kernel = (-0.5 * (x / sigma).square()).exp()
    return kernel / kernel.sum()


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """The windowed mean of the sum over channels, ``(N, 1, H, W)``."""
    r = len(kernel) // 2
    x = F.pad(x.sum(1, keepdim=True), (r, r, r, r), mode="replicate")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def _derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences, one-sided at the border."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def flow_change(video: Tensor, flow: Callable[[Tensor, Tensor], Tensor] = lucas_kanade) -> Tensor:
    """``mean_t,p |Flow(x_t) - Flow(x_{t-1})|^2``, a scalar in squared pixels, differentiable in the video.

    ``Flow(x_t)`` is the motion from frame ``t-1`` to frame ``t``, and both are taken at the same pixel.

    Args:
        video: ``(B, C, T, H, W)`` with 3 frames at least.
        flow: ``(N, C, H, W)`` twice to ``(N, 2, H, W)``.
    """
    if video.ndim != 5 or video.shape[2] < 3:
        raise ValueError(f"flow_change: video must be (B, C, T, H, W) with T at least 3, got {tuple(video.shape)}")
    frames = video.transpose(1, 2)  # (B, T, C, H, W)
    pairs = (frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1))
    flows = flow(*pairs).unflatten(0, (len(video), -1))
    return flows.diff(dim=1).square().sum(2).mean()


def temporal_loss(
    noise_loss: Tensor,
    video: Tensor,
    weight: float,
    flow: Callable[[Tensor, Tensor], Tensor] = lucas_kanade,
) -> Tensor:
    """``L = L_noise + weight * mean |Flow(x_t) - Flow(x_{t-1})|^2``: a denoiser's loss with a term for even motion.

    The term is 0 for a still video and for one that moves evenly; it punishes jitter, and true acceleration as well.

    Args:
        noise_loss: the denoiser's own loss, a scalar.
        video: the clean clips that the prediction stands for, ``(B, C, T, H, W)`` in [0, 1] or nearly.
        weight: of the term, per squared pixel.
        flow: a differentiable flow.
    """
    return noise_loss + weight * flow_change(video, flow)
