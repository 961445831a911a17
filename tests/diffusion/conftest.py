"""Small models, few clips."""

import pytest
import torch

from vdcore.diffusion import measure


@pytest.fixture(autouse=True)
def few_real_clips(monkeypatch):
    """Their flow takes most of the time of what is measured."""
    monkeypatch.setattr(measure, "REAL_CLIPS", 8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)
