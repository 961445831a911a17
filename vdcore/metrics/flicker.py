"""Which frames of a video flicker, and where: what is left of frame differences once motion is taken out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.metrics._check import check_video
from vdcore.metrics.consistency import Both
from vdcore.metrics.flow import Flow, as_flow, visible, warp


@dataclass(frozen=True)
class Flicker:
    """Of one clip of T frames.

    Args:
        change: ``(T-1,)``, from frame t to t+1: root mean square of what motion does not explain, where a point can be
            followed, in gray levels of 255.
        brightness: ``(T-1,)``, the part of it that is a change of the whole picture's brightness, with its sign.
        map: ``(T-1, H, W)``, the change of every pixel, 0 where it cannot be followed.
        odd: frames ``t + 1`` whose change stands out: above the median by more than 4 scaled median deviations, and by
            half of the median at least.
    """

    change: Tensor
    brightness: Tensor
    map: Tensor
    odd: tuple[int, ...]

    def place(self, frame: int, grid: int = 4) -> tuple[int, int, float]:
        """Row and column of that cell of a ``grid x grid`` in which most of a frame's change is, and its share."""
        cells = F.adaptive_avg_pool2d(self.map[frame - 1].square()[None], grid)[0]
        at = int(cells.argmax())
        return at // grid, at % grid, float(cells.flatten()[at] / cells.sum().clamp(min=1e-12))


@torch.no_grad()
def frame_flicker(video: Tensor, flow: Both | None = None) -> list[Flicker]:
    """Flicker of every clip, frame by frame.

    Args:
        video: ``(B, C, T, H, W)`` in [0, 1], T at least 2.
        flow: forward and backward, each ``(B, T-1, 2, H, W)`` in pixels; None: estimated.
    """
    video = check_video("frame_flicker", "video", video)
    forward, backward = as_flow("frame_flicker", video, flow)
    seen = visible(Flow(forward, backward))
    seen = torch.where(seen.any(-1).any(-1)[..., None, None], seen, True)  # nothing can be followed: all is compared
    frames = video.transpose(1, 2)  # (B, T, C, H, W)
    change = 255 * (warp(frames[:, 1:], forward) - frames[:, :-1])
    map = torch.where(seen, change.square().mean(2), 0.0)  # (B, T-1, H, W)
    pixels = seen.sum((-1, -2)).clamp(min=1)
    rms = (map.sum((-1, -2)) / pixels).sqrt()
    brightness = torch.where(seen, change.mean(2), 0.0).sum((-1, -2)) / pixels
    return [Flicker(r, b, m.sqrt(), _odd(r)) for r, b, m in zip(rms, brightness, map)]


def _odd(change: Tensor) -> tuple[int, ...]:
    middle = change.median()
    spread = 1.4826 * (change - middle).abs().median()
    far = change - middle > torch.maximum(4 * spread, 0.5 * middle).clamp(min=0.25)
    return tuple((far.nonzero().flatten() + 1).tolist())
