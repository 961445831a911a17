"""ComfyUI: vdcore as the attention of one model, through ``optimized_attention_override``.

ComfyUI hands every attention call of a model that has the option to a function of the user's, with its own as the first
argument. Tested against that signature, as of ComfyUI 0.3.60 and later; ComfyUI itself is not installed in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import vdcore

OPTION = "optimized_attention_override"


def attention_override(
    original: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """One attention call of ComfyUI.

    Masks, and precisions other than that of the inputs, are left to ComfyUI's own function.

    Args:
        original: ComfyUI's function.
        q, k, v: ``(B, N, heads * D)``, or ``(B, heads, N, D)`` with ``skip_reshape``.
        heads: of q.
        skip_output_reshape: return ``(B, heads, N, D)`` instead of ``(B, N, heads * D)``.
    """
    known = mask is None and attn_precision in (None, q.dtype) and q.dtype == k.dtype == v.dtype
    if known and skip_reshape:
        known = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    elif known:
        known = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    if not known:
        given = (q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape)
        return original(*given, **kwargs)
    if skip_reshape:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    out = vdcore.cross_attention(q.unsqueeze(1), k, v, scale=kwargs.get("scale"))
    out = out.squeeze(1)
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


def swap_in(model: Any) -> Any:
    """A clone of a ComfyUI model patcher whose attention runs on vdcore. The model given stays as it is.

    Raises:
        ValueError: if the model has another override already.
    """
    model = model.clone()
    options = {**model.model_options.get("transformer_options", {})}
    if options.get(OPTION) not in (None, attention_override):
        raise ValueError(f"swap_in: model must have no other {OPTION}, got {options[OPTION]!r}")
    model.model_options = {**model.model_options, "transformer_options": {**options, OPTION: attention_override}}
    return model
