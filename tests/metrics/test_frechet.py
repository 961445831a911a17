"""The Frechet distance against closed forms, and temporal FID on sets that differ in a known way."""

import pytest
import torch

from vdcore.metrics import frechet_distance, temporal_fid
from vdcore.video import MovingShapes


def test_one_dimension():
    """(mu_a - mu_b)^2 + (sigma_a - sigma_b)^2."""
    found = frechet_distance(torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([-2.0]), torch.tensor([[25.0]]))
    assert found.item() == pytest.approx(9 + 9)


def test_covariances_that_commute():
    """With one basis of eigenvectors, |mu|^2 + sum (sqrt a - sqrt b)^2."""
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    a, b = torch.rand(2, 6, dtype=torch.float64).unbind()
    mean = torch.randn(2, 6, dtype=torch.float64)
    found = frechet_distance(mean[0], basis @ a.diag() @ basis.T, mean[1], basis @ b.diag() @ basis.T)
    expected = (mean[0] - mean[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    torch.testing.assert_close(found, expected)


def test_any_two_covariances():
    """tr (A B)^1/2 is the sum of the roots of the eigenvalues of A B, which is not symmetric."""
    x, y = torch.randn(2, 8, 8, dtype=torch.float64)
    a, b = x @ x.T, y @ y.T
    zero = torch.zeros(8)
    expected = a.trace() + b.trace() - 2 * torch.linalg.eigvals(a @ b).real.sqrt().sum()
    torch.testing.assert_close(frechet_distance(zero, a, zero, b), expected)
    torch.testing.assert_close(frechet_distance(zero, a, zero, b), frechet_distance(zero, b, zero, a))


def test_singular_covariances():
    x = torch.randn(3, 8, dtype=torch.float64)
    a = x.T @ x  # rank 3
    zero = torch.zeros(8)
    assert frechet_distance(zero, a, zero, a).item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(frechet_distance(zero, a, zero, torch.zeros(8, 8)), a.trace())


def test_temporal_fid_orders_sets():
    def videos(first, **kind):
        return MovingShapes(frames=8, size=(24, 24), **kind).batch(range(first, first + 96)).video

    real = videos(0)
    other_half = temporal_fid(real, videos(1000))
    assert temporal_fid(real, real).item() == pytest.approx(0, abs=1e-6)
    faster = temporal_fid(real, videos(1000, speed=(2, 4)))
    still = temporal_fid(real, videos(1000)[:, :, :1].expand_as(real))
    flicker = temporal_fid(real, (videos(1000) + 0.05 * torch.randn_like(real)).clamp(0, 1))
    for worse in (faster, still, flicker):
        assert worse > 3 * other_half
    order = torch.arange(8).roll(4)
    assert temporal_fid(real, videos(1000)[:, :, order]) > other_half


def test_flicker_of_known_strength():
    """Frames that alternate by d around grey: signed changes are +-255 d, absolute ones 255 d, everywhere."""

    def alternating(d):
        video = torch.full((4, 1, 5, 8, 8), 0.5)
        video[:, :, 1::2] += d
        return video

    # d of the signed mean: means 0 and 0; one common factor of variance (255 d)^2 in every cell. Absolute: no variance.
    a, b, cells = 0.1, 0.3, 4
    n = 16
    root = (n / (n - 1)) ** 0.5  # the covariance is the unbiased one
    expected = cells * (255 * root * (b - a)) ** 2 + cells * (255 * (b - a)) ** 2
    found = temporal_fid(alternating(a), alternating(b), grid=2)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_bad_input():
    video = torch.rand(2, 3, 3, 8, 8)
    with pytest.raises(ValueError, match="fake must have the 3 channels of real, got 1"):
        temporal_fid(video, video[:, :1])
    with pytest.raises(ValueError, match="grid must be between 1 and the size of a frame, got 9"):
        temporal_fid(video, video, grid=9)
    with pytest.raises(ValueError, match="real must have at least 2 pairs of frames, got 1"):
        temporal_fid(video[:1, :, :2], video)
    with pytest.raises(ValueError, match=r"frechet_distance: means must be \(d,\)"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))
