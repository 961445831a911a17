"""Small models on one thread."""

import pytest
import torch

from vdcore.demo import train_sample
from vdcore.diffusion import measure


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_real_clips(monkeypatch):
    """Their flow takes most of the time of what is measured."""
    for module in (measure, train_sample):
        monkeypatch.setattr(module, "REAL_CLIPS", 8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)
