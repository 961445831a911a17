"""Attention inside a frame and across frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.call import FrameCall
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import _check as check
from vdcore.ops._operator import register, run
from vdcore.ops.temporal_attention import norm_rope_tensors, prepare_attention
from vdcore.rope import Rope

SPATIAL, VIDEO = "spatial_attention", "video_attention"


def spatial_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The tokens of a frame attend to one another: :func:`video_attention` with ``FrameMask.same_frame()``.

    Args:
        q: ``(B, T, S, H, D)``, or packed ``(B, T, S, 3, H, D)`` with k and v None.
        k, v: ``(B, T, S, G, D)``; G divides H.
        scale, norm, rope, return_lse, backend: as in :func:`temporal_attention`.

    Returns:
        ``(B, T, S, H, D)`` in q's dtype, contiguous; with ``return_lse`` also lse, float32 ``(B, T, S, H)``.
    """
    call = _prepare_spatial(q, k, v, scale=scale, norm=norm, rope=rope, return_lse=return_lse)
    out, lse = run(call, backend)
    shape = call.q.shape
    return (out.view(shape), lse.view(shape[:-1])) if return_lse else out.view(shape)


def video_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: FrameMask = FrameMask(),
    q_start: int | None = None,
    lengths: Tensor | None = None,
    text: tuple[Tensor, Tensor, Tensor] | None = None,
    text_lengths: Tensor | None = None,
    text_norm: QKNorm | None = None,
    text_first: bool = False,
    text_sees: str = "all",
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Every token attends to all tokens of the frames that its frame sees, and to the text.

    Work is proportional to the visible pairs. Text joins the sequence without being concatenated to it.

    Args:
        q, k, v, mask, q_start, lengths, scale, norm, rope, return_lse, backend: as in :func:`temporal_attention`.
        text: ``(q, k, v)`` of the text, ``(B, L, H, D)``, ``(B, L, G, D)`` twice; they may be views of one tensor.
        text_lengths: ``(B,)``, valid text tokens. Text keys past it are invisible, text query rows past it give 0.
            Below 0 counts as 0, above L as L.
        text_norm: as ``norm``, for the text; text is never rotated.
        text_first: the text comes first in the joint sequence, instead of last.
        text_sees: ``"all"``: text attends to everything; ``"text"``: to text only, so that under a causal mask the
            future cannot leak through it.

    Returns:
        ``(B, T, S, H, D)`` in q's dtype, contiguous; with text ``(out, out_text)``, both views of one
        ``(B, T*S + L, H, D)`` buffer. With ``return_lse`` a pair of that and lse, float32 ``(B, T, S, H)``, with text
        ``(lse, lse_text)``.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    call = _prepare_video(
        q,
        k,
        v,
        mask=mask,
        q_start=q_start,
        lengths=lengths,
        text=text,
        text_lengths=text_lengths,
        text_norm=text_norm,
        text_first=text_first,
        text_sees=text_sees,
        scale=scale,
        norm=norm,
        rope=rope,
        return_lse=return_lse,
    )
    out, lse = run(call, backend)
    result = _split(call, out, call.q.shape)
    return (result, _split(call, lse, call.q.shape[:-1])) if return_lse else result


def _split(call: FrameCall, joint: Tensor, shape: Any) -> Any:
    """Views of the joint sequence: video in the given shape, and text."""
    if call.text is None:
        return joint.view(shape)
    L, N = call.text[0].shape[1], call.q.shape[1] * call.q.shape[2]
    text, video = (joint[:, :L], joint[:, L:]) if call.text_first else (joint[:, N:], joint[:, :N])
    return video.unflatten(1, (shape[1], shape[2])), text


def _prepare_spatial(
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    scale: Any = None,
    norm: Any = None,
    rope: Any = None,
    return_lse: bool = False,
) -> FrameCall:
    args = prepare_attention(SPATIAL, q, k, v, FrameMask.same_frame(), 0, None, scale, norm, rope)
    if args["k"].shape[1] != args["q"].shape[1]:
        check.check_shape(SPATIAL, "k", args["k"], (*args["q"].shape[:3], *args["k"].shape[3:]), "(B, T, S, G, D)")
    grad = check.wants_grad(args["q"], args["k"], args["v"], *norm_rope_tensors(args["norm"], args["rope"]))
    return FrameCall(op=SPATIAL, grad=grad, return_lse=bool(return_lse), **args)


def _prepare_video(
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    mask: Any = FrameMask(),
    q_start: Any = None,
    lengths: Any = None,
    text: Any = None,
    text_lengths: Any = None,
    text_norm: Any = None,
    text_first: bool = False,
    text_sees: str = "all",
    scale: Any = None,
    norm: Any = None,
    rope: Any = None,
    return_lse: bool = False,
) -> FrameCall:
    args = prepare_attention(VIDEO, q, k, v, mask, q_start, lengths, scale, norm, rope)
    q, G = args["q"], args["k"].shape[3]
    B, _, _, H, D = q.shape
    if text_sees not in ("all", "text"):
        check.wrong(VIDEO, "text_sees", "'all' or 'text'", repr(text_sees))
    if text is not None:
        text = _check_text(text, q, G)
        text_lengths = check.check_lengths(VIDEO, "text_lengths", text_lengths, [(B,)], "(B,)", q)
        text_norm = check.check_norm(VIDEO, text_norm, q, H, G, D, name="text_norm")
    elif text_lengths is not None or text_norm is not None:
        name = "text_lengths" if text_lengths is not None else "text_norm"
        check.wrong(VIDEO, name, "None without text", "a value")
    grad = check.wants_grad(
        *(q, args["k"], args["v"], *norm_rope_tensors(args["norm"], args["rope"])),
        *(*(text or ()), *norm_rope_tensors(text_norm, None)),
    )
    return FrameCall(
        op=VIDEO,
        grad=grad,
        return_lse=bool(return_lse),
        text=text,
        text_lengths=text_lengths,
        text_norm=text_norm,
        text_first=bool(text_first),
        text_sees=text_sees,
        **args,
    )


def _check_text(text: Any, q: Tensor, G: int) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(text, (tuple, list)) or len(text) != 3:
        raise TypeError(f"{VIDEO}: text must be a tuple (q, k, v) or None, got {type(text).__name__}")
    B, _, _, H, D = q.shape
    text = check.autocast(*(check.check_tensor(VIDEO, f"text[{i}]", x) for i, x in enumerate(text)))
    for i, (x, heads, letter) in enumerate(zip(text, (H, G, G), "HGG")):
        check.check_like(VIDEO, f"text[{i}]", x, q, "q")
        if x.ndim != 4:
            check.wrong(VIDEO, f"text[{i}]", f"(B, L, {letter}, D)", check.shape_of(x))
        check.check_shape(VIDEO, f"text[{i}]", x, (B, text[0].shape[1], heads, D), f"(B, L, {letter}, D)")
    return tuple(check.unit_stride(x) for x in text)  # type: ignore[return-value]


register(SPATIAL, FrameCall, _prepare_spatial)
register(VIDEO, FrameCall, _prepare_video)
