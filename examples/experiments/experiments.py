"""What ``vdcore demo`` can run: a module each, with ``run(out) -> Figure``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from vdcore.demo.figure import Figure

# In the order of the report. Those after train_sample may use the model that it leaves.
EXPERIMENTS = (
    "train_sample",
    "flicker",
    "horizon",
    "motion_paths",
    "splicing",
    "rolling_cache",
    "latte_weights",
    "inflation",
    "causal_encoder",
)


def load(name: str) -> Callable[[Path], Figure]:
    """The experiment's ``run``."""
    if name not in EXPERIMENTS:
        raise ValueError(f"demo: {name} must be one of {', '.join(EXPERIMENTS)}")
    return importlib.import_module(f"vdcore.demo.{name}").run
