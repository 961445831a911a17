"""Every video model of diffusers, tiny, with random weights and inputs: for tests, tables and measurements, offline.

Clips have at least three frames and are wider than high, so that no axis can be taken for another.
"""

from vdcore.integrations.diffusers.zoo._factorised import FACTORISED
from vdcore.integrations.diffusers.zoo._full import FULL
from vdcore.integrations.diffusers.zoo._joint import JOINT
from vdcore.integrations.diffusers.zoo._tiny import L, T, Tiny, output

MODELS: dict[str, Tiny] = {**FACTORISED, **FULL, **JOINT}

__all__ = ["MODELS", "L", "T", "Tiny", "output"]
