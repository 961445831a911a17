"""The official Wan repository: vdcore in place of its ``flash_attention``.

Tested against the signature of ``wan/modules/attention.py`` of Wan 2.1 and 2.2; the repository itself is not installed
in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vdcore
from vdcore.integrations.report import Report
from vdcore.integrations.swap import Renamed, swap_model, swap_out

__all__ = ["attention", "flash_attention", "swap_in", "swap_out"]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> Tensor:
    """Attention of ``(B, Lq, Nq, C)`` to ``(B, Lk, Nk, C)``; vdcore is deterministic always.

    As in the host, float32 inputs on a GPU are computed in ``dtype``, and the result has the dtype of q.

    Args:
        q_lens, k_lens: ``(B,)``, valid rows and keys; rows past ``q_lens`` come out as attention to the valid keys.
        q_scale: multiplies q.

    Raises:
        NotImplementedError: dropout, and masks of tokens.
    """
    if dropout_p or causal or tuple(window_size) != (-1, -1):
        raise NotImplementedError(
            f"flash_attention: dropout_p, causal and window_size must be 0, False and (-1, -1), "
            f"got {dropout_p}, {causal} and {window_size}"
        )
    out_dtype = q.dtype
    if q.is_cuda and v.dtype not in (torch.float16, torch.bfloat16):
        v = v.to(dtype)
    q, k = q.to(v.dtype), k.to(v.dtype)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if q_scale is not None:
        scale = scale * q_scale
    lengths = None if k_lens is None else k_lens.to(q.device, torch.int64)
    out = vdcore.cross_attention(q.unsqueeze(1), k, v, lengths=lengths, scale=scale)
    return out.squeeze(1).to(out_dtype)


def attention(*args: Any, fa_version: int | None = None, **kwargs: Any) -> Tensor:
    """The host's other name for the same, with the version of its kernels named otherwise."""
    return flash_attention(*args, **kwargs)


NAMES = Renamed((("flash_attention", flash_attention), ("attention", attention)), "cross_attention")


def swap_in(model: nn.Module) -> Report:
    """Puts a Wan model on vdcore: modules whose forward calls the host's attention. Nothing else of the host changes.

    Raises:
        TypeError: if it is no module.
    """
    return swap_model(model, NAMES.find)
