"""Every video model of diffusers, tiny, with random weights and inputs: for tests, tables and measurements, offline.

Clips have at least three frames and are wider than high, so that no axis can be taken for another.
"""

from zoo.factorized import FACTORIZED
from zoo.full import FULL
from zoo.joint import JOINT
from zoo.tiny import L, T, Tiny, output

MODELS: dict[str, Tiny] = {**FACTORIZED, **FULL, **JOINT}

__all__ = ["MODELS", "L", "T", "Tiny", "output"]
