"""Measures of a set of videos against another: do they change over time in the same ways?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.metrics._check import check_video


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982).

    ``|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a^1/2 cov_b cov_a^1/2)^1/2)``, in float64. The root is taken of a
    symmetric matrix, so singular covariances need no added diagonal.

    Args:
        mean_a, mean_b: ``(d,)``.
        cov_a, cov_b: ``(d, d)``, symmetric, no negative eigenvalue.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    d = len(mean_a)
    if mean_b.shape != (d,) or cov_a.shape != (d, d) or cov_b.shape != (d, d):
        found = [tuple(x.shape) for x in (mean_a, cov_a, mean_b, cov_b)]
        raise ValueError(f"frechet_distance: means must be (d,) and covariances (d, d), got {found}")
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).clamp(min=0)


@torch.no_grad()
def temporal_fid(real: Tensor, fake: Tensor, *, grid: int = 4) -> Tensor:
    """Frechet distance between two sets of videos over their frame differences. Ours, and not calibrated.

    A sample is a pair of consecutive frames; its features are the difference's mean and its mean absolute value in each
    cell of a ``grid x grid`` and each channel, in gray levels of 255: what moves or fades where, and what flickers. No
    network is in it, so it judges change over time and knows nothing of what is shown. It is no FID or FVD: compare its
    values only with values from as many pairs of frames, and with the distance between two halves of the real set.

    Args:
        real, fake: ``(B, C, T, H, W)`` in [0, 1], of equal C; pairs of frames should outnumber the
            ``2 * C * grid^2`` features by far.
        grid: cells per side.

    Returns:
        A float64 scalar, squared gray levels; lower is better.
    """
    real, fake = check_video("temporal_fid", "real", real), check_video("temporal_fid", "fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"temporal_fid: fake must have the {real.shape[1]} channels of real, got {fake.shape[1]}")
    if grid < 1 or grid > min(*real.shape[3:], *fake.shape[3:]):
        raise ValueError(f"temporal_fid: grid must be between 1 and the size of a frame, got {grid}")
    features = [_change_features(x, grid) for x in (real, fake)]
    for name, x in zip(("real", "fake"), features):
        if len(x) < 2:
            raise ValueError(f"temporal_fid: {name} must have at least 2 pairs of frames, got {len(x)}")
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), x.T.cov().reshape(x.shape[1], -1)) for x in features)
    return frechet_distance(mean_a, cov_a, mean_b, cov_b)


def _change_features(video: Tensor, grid: int) -> Tensor:
    """``(B (T-1), 2 C grid^2)`` float64."""
    change = 255 * video.double().diff(dim=2).transpose(1, 2).flatten(0, 1)
    cells = [F.adaptive_avg_pool2d(x, grid).flatten(1) for x in (change, change.abs())]
    return torch.cat(cells, 1)
