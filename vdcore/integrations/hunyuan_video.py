"""The official HunyuanVideo repository: vdcore in place of its ``attention``.

Tested against the signature of ``hyvideo/modules/attenion.py``; the repository itself is not installed in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vdcore
from vdcore.integrations import _rebind


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

    Raises:
        NotImplementedError: dropout, dense masks, masks of tokens.
    """
    if drop_rate or causal or attn_mask is not None:
        raise NotImplementedError("attention: drop_rate, attn_mask and causal must be 0, None and False")
    lengths = None
    if mode == "flash" and cu_seqlens_kv is not None:
        bounds = cu_seqlens_kv.to(torch.int64)
        if bounds.shape[0] != 2 * batch_size + 1:
            expected = 2 * batch_size + 1
            raise ValueError(f"attention: cu_seqlens_kv must hold {expected} bounds, got {bounds.shape[0]}")
        lengths = bounds[1::2] - bounds[:-1:2]
    out = vdcore.cross_attention(q.unsqueeze(1), k, v, lengths=lengths)
    assert isinstance(out, Tensor)
    return out.squeeze(1).flatten(2)


_rebind.TABLES[__name__] = {"attention": attention}


def swap_in(model: nn.Module) -> list[str]:
    """Puts a HunyuanVideo model on vdcore; returns the paths of the modules that changed."""
    return _rebind.swap_names(model, __name__)


def swap_out(model: nn.Module) -> None:
    """Undoes :func:`swap_in`, bit for bit."""
    _rebind.restore_names(model)
