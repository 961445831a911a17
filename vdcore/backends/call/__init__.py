"""What a backend is asked to do: one plain record per operator family, checked and with all defaults filled in.

A record also says how it crosses a torch operator's boundary, which takes tensors and numbers only: ``tensors()`` and
``attributes()`` take it apart in the order of ``TENSORS`` and ``ATTRIBUTES``, ``build()`` puts it together again.
"""

from vdcore.backends.call.attention import (
    QKV,
    AttentionCall,
    CrossCall,
    FrameCall,
    GatedCall,
    QKNormRopeCall,
    TemporalCall,
)
from vdcore.backends.call.base import Call, lse_dtype, mask_numbers
from vdcore.backends.call.rows import GateResidualCall, ModulateCall, PatchifyCall, UnpatchifyCall

__all__ = [
    "QKV",
    "AttentionCall",
    "Call",
    "CrossCall",
    "FrameCall",
    "GateResidualCall",
    "GatedCall",
    "ModulateCall",
    "PatchifyCall",
    "QKNormRopeCall",
    "TemporalCall",
    "UnpatchifyCall",
    "lse_dtype",
    "mask_numbers",
]
