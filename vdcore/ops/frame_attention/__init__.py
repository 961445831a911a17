"""Attention inside a frame and across frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, overload

from torch import Tensor

from vdcore.grid_mask import GridMask, HeadMasks
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import check
from vdcore.ops.call import QKV, AttentionCall, Triple, empty, lse_dtype
from vdcore.ops.frame_attention import cpu_tangents, cuda, reference, sdpa, tangents, triton, windows_cpu
from vdcore.ops.operator import by_formula, register, run
from vdcore.rope import Rope

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class VideoCall(AttentionCall):
    op: ClassVar[str] = "video_attention"

    mask: FrameMask | HeadMasks  # type: ignore[assignment]
    text: Triple | None = None
    text_lengths: Tensor | None = None
    text_norm: QKNorm | None = None
    text_first: bool = False
    text_sees: str = "all"

    @property
    def is_dense(self) -> bool:
        dense = self.mask in (FrameMask.full(), FrameMask.same_frame())
        return dense and self.lengths is self.text is self.norm is self.rope is None

    @property
    def frame_mask(self) -> FrameMask:
        """The mask, for who knows no other."""
        assert isinstance(self.mask, FrameMask)
        return self.mask

    @property
    def rows(self) -> int:
        """Length of the joint sequence of video and text."""
        return self.q.shape[1] * self.q.shape[2] + (0 if self.text is None else self.text[0].shape[1])

    def empty_outputs(self) -> tuple[Tensor, Tensor | None]:
        """out ``(B, rows, H, D)`` and lse ``(B, rows, H)``."""
        B, _, _, H, D = self.q.shape
        lse = empty(self.q, (B, self.rows, H), lse_dtype(self.q)) if self.return_lse or self.grad else None
        return empty(self.q, (B, self.rows, H, D)), lse


class SpatialCall(VideoCall):
    """Video attention with ``mask=FrameMask.same_frame()`` and no text."""

    op: ClassVar[str] = "spatial_attention"


class _More(TypedDict, total=False):
    scale: float | None
    norm: QKNorm | None
    rope: Rope | None
    backend: str | None


@overload
def spatial_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: Literal[False] = ..., **kw: Unpack[_More]
) -> Tensor: ...
@overload
def spatial_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: Literal[True], **kw: Unpack[_More]
) -> tuple[Tensor, Tensor]: ...
@overload
def spatial_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: bool, **kw: Unpack[_More]
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    op = SpatialCall.op
    arguments = check.check_attention(op, q, k, v, FrameMask.same_frame(), 0, None, scale, norm, rope)
    call = SpatialCall(*arguments, bool(return_lse))
    if call.k.shape[1] != call.q.shape[1]:
        check.check_shape(op, "k", call.k, (*call.q.shape[:3], *call.k.shape[3:]), "(B, T, S, G, D)")
    out, lse = run(call, backend)
    shape = call.q.shape
    return (out.view(shape), lse.view(shape[:-1])) if return_lse else out.view(shape)


Mask = FrameMask | GridMask | tuple[tuple[int, FrameMask | GridMask], ...]


class _VideoMore(_More, total=False):
    mask: Mask
    grid: tuple[int, int] | None
    q_start: int | None
    lengths: Tensor | None
    text_lengths: Tensor | None
    text_norm: QKNorm | None
    text_first: bool
    text_sees: str


@overload
def video_attention(
    q: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    text: None = ...,
    return_lse: Literal[False] = ...,
    **kw: Unpack[_VideoMore],
) -> Tensor: ...
@overload
def video_attention(
    q: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    text: None = ...,
    return_lse: Literal[True],
    **kw: Unpack[_VideoMore],
) -> tuple[Tensor, Tensor]: ...
@overload
def video_attention(
    q: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    text: Triple | None = ...,
    return_lse: bool = ...,
    **kw: Unpack[_VideoMore],
) -> Any: ...
def video_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: Mask = FrameMask(),
    grid: tuple[int, int] | None = None,
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
        q, k, v, q_start, lengths, scale, norm, rope, return_lse, backend: as in :func:`temporal_attention`.
        mask: a :class:`FrameMask`; a :class:`GridMask`, with windows in rows and columns of tokens; or a tuple of pairs
            ``(count, mask)``: groups of query heads with masks of their own. Counts are multiples of ``H // G``: heads
            that share a key are of one group. Their sum is H.
        grid: ``(rows, columns)`` of a frame's tokens, in raster order; ``rows * columns == S``. Needed with a GridMask.
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
    op = VideoCall.op
    check.check_mask_type(op, mask, grids=True)
    frames = mask if isinstance(mask, FrameMask) else FrameMask()
    arguments = check.check_attention(op, q, k, v, frames, q_start, lengths, scale, norm, rope)
    qkv = arguments[0]
    text, text_lengths, text_norm = check.check_text(
        op, text, text_lengths, text_norm, text_sees, qkv.views[0], qkv.sizes[-1]
    )
    call = VideoCall(
        qkv,
        _check_mask(mask, grid, qkv, arguments[2]),
        *arguments[2:],
        bool(return_lse),
        text=text,
        text_lengths=text_lengths,
        text_norm=text_norm,
        text_first=bool(text_first),
        text_sees=text_sees,
    )
    out, lse = run(call, backend)
    result = _split(call, out, call.q.shape)
    return (result, _split(call, lse, call.q.shape[:-1])) if return_lse else result


def _split(call: VideoCall, joint: Tensor, shape: Any) -> Any:
    """Views of the joint sequence: video in the given shape, and text."""
    if call.text is None:
        return joint.view(shape)
    L, N = call.text[0].shape[1], call.q.shape[1] * call.q.shape[2]
    text, video = (joint[:, :L], joint[:, L:]) if call.text_first else (joint[:, N:], joint[:, :N])
    return video.unflatten(1, (shape[1], shape[2])), text


def _check_mask(mask: Any, grid: Any, qkv: QKV, q_start: int) -> FrameMask | HeadMasks:
    _, T, S, H, _, T_k, G = qkv.sizes
    masks = check.check_grid_mask(VideoCall.op, mask, grid, S, H, G)
    for one in (masks,) if isinstance(masks, FrameMask) else (part.frames for _, part in masks.groups):
        check.check_teacher_forcing(VideoCall.op, one, T, T_k, q_start)
    return masks


_BACKENDS = {
    "cpu": replace(windows_cpu.FRAMES, tangents=cpu_tangents.video_attention),
    "triton": triton.FRAMES,
    "cuda": cuda.FRAMES,
    "sdpa": sdpa.FRAMES,
}
register(
    spatial_attention,
    SpatialCall,
    tangents.video_attention,
    reference=by_formula(reference.video_attention),
    **_BACKENDS,
)
register(
    video_attention, VideoCall, tangents.video_attention, reference=by_formula(reference.video_attention), **_BACKENDS
)
