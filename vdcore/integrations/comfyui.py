"""ComfyUI: vdcore as the attention of one model, through ``optimized_attention_override``.

ComfyUI hands every attention call of a model that has the option to a function of the user's, with its own as the first
argument. Tested against that signature, as of ComfyUI 0.3.60 and later; ComfyUI itself is not installed in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import vdcore
from vdcore.integrations.report import Report, note_left
from vdcore.integrations.swap import Change, make_all

OPTION = "optimized_attention_override"


class AttentionOverride:
    """The function that ComfyUI hands its attention calls to. Clones of a model share it, and so its report."""

    def __call__(
        self,
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
        reason = None
        ranks = 4 if skip_reshape else 3
        if mask is not None:
            reason = "an attention mask"
        elif attn_precision not in (None, q.dtype) or not q.dtype == k.dtype == v.dtype:
            reason = "a precision other than that of its inputs"
        elif not q.ndim == k.ndim == ranks or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
            reason = "queries, keys and values of shapes that do not fit"
        if reason is not None:
            note_left(self, reason)
            return original(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **kwargs)
        if skip_reshape:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        else:
            q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        out = vdcore.cross_attention(q.unsqueeze(1), k, v, scale=kwargs.get("scale")).squeeze(1)
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    def __deepcopy__(self, memo: Any) -> AttentionOverride:
        return self


attention_override = AttentionOverride()


def swap_in(model: Any) -> Report:
    """Puts the attention of a ComfyUI model patcher on vdcore, by an option of its own: the model beneath stays.

    A node swaps a clone of the model that it is given. Clones of a swapped one are swapped.

    Raises:
        TypeError: if it is no model patcher.
        ValueError: if the model has another override already.
    """
    override = _options(model, "swap_in").get(OPTION)
    if override is None:
        make_all([Change(model, _put, swap_out)])
    elif not isinstance(override, AttentionOverride):
        raise ValueError(f"swap_in: model must have no other {OPTION}, got {override!r}")
    report = Report()
    report.add_served(OPTION, type(model).__name__, "cross_attention", _options(model, "swap_in")[OPTION])
    return report


def swap_out(model: Any) -> None:
    """Undoes :func:`swap_in`: all options are what they were. A model that was never swapped stays as it is."""
    options = _options(model, "swap_out")
    if isinstance(options.get(OPTION), AttentionOverride):
        _set(model, {name: value for name, value in options.items() if name != OPTION})


def _options(model: Any, verb: str) -> dict[str, Any]:
    options = getattr(model, "model_options", None)
    if not isinstance(options, dict) or not isinstance(options.get("transformer_options"), dict):
        raise TypeError(f"{verb}: model must be a model patcher of ComfyUI, got {type(model).__name__}")
    return options["transformer_options"]


def _put(model: Any) -> None:
    _set(model, {**_options(model, "swap_in"), OPTION: AttentionOverride()})


def _set(model: Any, options: dict[str, Any]) -> None:
    # Dicts of their own: a host's clones may share them.
    model.model_options = {**model.model_options, "transformer_options": options}
