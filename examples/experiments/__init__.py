"""Experiments that show what this engine is for, one figure per claim: ``vdcore demo`` runs them.

Each is a module with a function ``run(out) -> Figure``. They are part of a checkout and not of the installed package:
the folder ``examples`` is a source root, which the command appends to the import path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from experiments.figure import Figure

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
    return importlib.import_module(f"experiments.{name}").run
