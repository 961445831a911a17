"""Measures of a set of videos against another: do they change over time in the same ways?"""

from __future__ import annotations

from typing import NamedTuple

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


class FidEstimate(NamedTuple):
    """A temporal FID and how far it can be believed.

    Args:
        value: of the sets at hand, as :func:`temporal_fid` gives it: too large, the more so the fewer clips.
        corrected: without the bias of a finite number of clips, to its first order: what many clips would give. It may
            fall below 0 where both sets are alike.
        low, high: 95 % interval of that.
        clips: of the real and of the other set.
    """

    value: float
    corrected: float
    low: float
    high: float
    clips: tuple[int, int]

    def __str__(self) -> str:
        real, fake = self.clips
        return f"{self.corrected:.4g} (95 %: {self.low:.4g} to {self.high:.4g}; {real} real clips, {fake} others)"


@torch.no_grad()
def temporal_fid_estimate(real: Tensor, fake: Tensor, *, grid: int = 4) -> FidEstimate:
    """The temporal FID with its confidence at the given numbers of clips, by leaving out one clip after the other.

    The jackknife (Quenouille 1949, Tukey 1958), over clips and not over pairs of frames, which are not independent:
    with ``d_i`` the distance without clip i of a set of n, the set adds ``(n - 1) (mean d_i - d)`` to the bias and
    ``(n - 1) / n sum (d_i - mean d_i)^2`` to the variance.

    The interval is the normal approximation's: of 12 to 48 random clips it held the value of many in 83 to 98 of 100
    draws, more often where both sets were alike.

    Args:
        real, fake, grid: as in :func:`temporal_fid`; at least 3 clips each.
    """
    value = temporal_fid(real, fake, grid=grid).item()
    for name, video in (("real", real), ("fake", fake)):
        if len(video) < 3:
            raise ValueError(f"temporal_fid_estimate: {name} must have at least 3 clips, got {len(video)}")
    sums = [_sums(check_video("temporal_fid_estimate", "video", x), grid) for x in (real, fake)]
    wholes = [_gaussian(*(x.sum(0) for x in of_set)) for of_set in sums]
    bias, variance = 0.0, 0.0
    for number, of_set in enumerate(sums):
        n, left = len(of_set[0]), []
        for i in range(n):
            pair = list(wholes)
            pair[number] = _gaussian(*(x.sum(0) - x[i] for x in of_set))
            left.append(frechet_distance(*pair[0], *pair[1]).item())
        without = torch.tensor(left, dtype=torch.float64)
        bias += (n - 1) * (without.mean().item() - value)
        variance += (n - 1) / n * (without - without.mean()).square().sum().item()
    corrected, reach = value - bias, 1.96 * variance**0.5
    return FidEstimate(value, corrected, corrected - reach, corrected + reach, (len(real), len(fake)))


def _sums(video: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per clip: number of pairs of frames ``(B,)``, sums of features ``(B, d)`` and of their products ``(B, d, d)``."""
    features = _change_features(video, grid).unflatten(0, (len(video), -1))
    count = torch.full((len(video),), features.shape[1], dtype=torch.float64)
    return count, features.sum(1), features.mT @ features


def _gaussian(count: Tensor, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / count
    return mean, (products - count * mean[:, None] * mean) / (count - 1)


def _change_features(video: Tensor, grid: int) -> Tensor:
    """``(B (T-1), 2 C grid^2)`` float64."""
    change = 255 * video.double().diff(dim=2).transpose(1, 2).flatten(0, 1)
    cells = [F.adaptive_avg_pool2d(x, grid).flatten(1) for x in (change, change.abs())]
    return torch.cat(cells, 1)
