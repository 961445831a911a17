"""Video diffusion transformers on the operators of vdcore, and what surrounds them."""

from vdcore.models.autoencoder import AutoencoderConfig, CausalAutoencoder
from vdcore.models.cache import FrameCache
from vdcore.models.causal_conv import CausalConv3d
from vdcore.models.config import VDiTConfig
from vdcore.models.control import DepthControl
from vdcore.models.inflate import inflate
from vdcore.models.latte import from_latte
from vdcore.models.presets import PRESETS
from vdcore.models.vdit import VDiT

__all__ = [
    "PRESETS",
    "AutoencoderConfig",
    "CausalAutoencoder",
    "CausalConv3d",
    "DepthControl",
    "FrameCache",
    "VDiT",
    "VDiTConfig",
    "from_latte",
    "inflate",
]
