"""Video diffusion transformers on the operators of vdcore."""

from vdcore.models.cache import FrameCache
from vdcore.models.config import VDiTConfig
from vdcore.models.layout import switch_layout
from vdcore.models.presets import PRESETS
from vdcore.models.vdit import VDiT

__all__ = ["PRESETS", "FrameCache", "VDiT", "VDiTConfig", "switch_layout"]
