"""ComfyUI: vdcore as the attention of one model, through ``optimized_attention_override``.

ComfyUI hands every attention call of a model that has the option to a function of the user's, with its own as the first
argument. Tested against that signature, as of ComfyUI 0.7.0; ComfyUI itself is not installed in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import vdcore
from vdcore.integrations.report import TURN, Report, note_left
from vdcore.integrations.swap import Change, make_all

OPTION = "optimized_attention_override"


class AttentionOverride:
    """The function that ComfyUI hands its attention calls to. Clones of a model share it, and so its report."""

    instead_of: Mapping[str, Any] = {}  # the option as it was, if it was there
    had_options = True  # there was a dict of options

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
        if TURN.is_hosts:
            reason = "the host's turn in a check"
        elif mask is not None:
            reason = "an attention mask"
        elif attn_precision not in (None, q.dtype) or not q.dtype == k.dtype == v.dtype:
            reason = "a precision other than that of its inputs"
        elif not q.ndim == k.ndim == ranks or k.shape != v.shape or not _fit(q, k):
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


def _fit(q: Tensor, k: Tensor) -> bool:
    """One batch, one number of channels, and heads of q that those of k divide where they have an axis."""
    heads = q.ndim < 4 or (k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0)
    return q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1] and heads


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
    override = options.get(OPTION)
    if isinstance(override, AttentionOverride):
        rest = {name: value for name, value in options.items() if name != OPTION}
        _set(model, {**rest, **override.instead_of}, keep=override.had_options)


def _options(model: Any, verb: str) -> dict[str, Any]:
    options = getattr(model, "model_options", None)
    found = options.get("transformer_options", {}) if isinstance(options, dict) else None
    if not isinstance(found, dict):
        raise TypeError(f"{verb}: model must be a model patcher of ComfyUI, got {type(model).__name__}")
    return found


def _put(model: Any) -> None:
    options, override = _options(model, "swap_in"), AttentionOverride()
    override.instead_of = {name: value for name, value in options.items() if name == OPTION}
    override.had_options = "transformer_options" in model.model_options
    _set(model, {**options, OPTION: override})


def _set(model: Any, options: dict[str, Any], keep: bool = True) -> None:
    # Dicts of their own: a host's clones may share them.
    rest = {name: value for name, value in model.model_options.items() if name != "transformer_options"}
    model.model_options = {**rest, "transformer_options": options} if options or keep else rest
