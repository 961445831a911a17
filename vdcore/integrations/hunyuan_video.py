"""The official HunyuanVideo repository: vdcore in place of its ``attention``.

Written against ``hyvideo/modules/attenion.py`` as of the commit that docs/hunyuan_video.md names; the repository
itself is not installed in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vdcore
from vdcore.integrations.report import Report, note_left_by_running
from vdcore.integrations.swap import Renamed, swap_model, swap_out

__all__ = ["attention", "swap_in", "swap_out"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str = "flash",
    drop_rate: float = 0,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: Any = None,
    max_seqlen_kv: Any = None,
    batch_size: int = 1,
) -> Tensor:
    """Attention of ``(B, N, H, D)`` to keys of the same shape or another length: ``(B, N, H * D)``.

    The host packs every sample as its valid tokens and its padding, ``2 B + 1`` bounds in ``cu_seqlens``. Here the
    valid tokens are a length; rows of padding attend to them too, where the host lets them attend to one another.

    A dense mask, as the refiner of text tokens has it, a causal one and dropout run on torch, in modes "torch" and
    "vanilla", and are noted in the report; mode "flash" has none of them.

    Raises:
        NotImplementedError: one of them in mode "flash".
    """
    if drop_rate or causal or attn_mask is not None:
        if mode == "flash":
            raise NotImplementedError(
                "attention: drop_rate, attn_mask and causal must be 0, None and False in mode flash"
            )
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(q.dtype)
        note_left_by_running("a dense or causal mask, or dropout, which torch's attention runs")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=drop_rate, is_causal=causal)
        return out.transpose(1, 2).flatten(2)
    lengths = None
    if mode == "flash" and cu_seqlens_kv is not None:
        bounds = cu_seqlens_kv.to(torch.int64)
        if bounds.shape[0] != 2 * batch_size + 1:
            expected = 2 * batch_size + 1
            raise ValueError(f"attention: cu_seqlens_kv must hold {expected} bounds, got {bounds.shape[0]}")
        lengths = bounds[1::2] - bounds[:-1:2]
    served = vdcore.cross_attention(q.unsqueeze(1), k, v, lengths=lengths)
    return served.squeeze(1).flatten(2)


NAMES = Renamed((("attention", attention),), "cross_attention")


def swap_in(model: nn.Module) -> Report:
    """Puts a HunyuanVideo model on vdcore: modules whose forward calls the host's attention.

    Raises:
        TypeError: if it is no module.
    """
    return swap_model(model, NAMES.find)
