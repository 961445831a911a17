"""Few clips."""

import pytest

from experiments import train_sample


@pytest.fixture(autouse=True)
def few_real_clips(monkeypatch):
    """Their flow takes most of the time of what is measured."""
    monkeypatch.setattr(train_sample, "REAL_CLIPS", 8)
