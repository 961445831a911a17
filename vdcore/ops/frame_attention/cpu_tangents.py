"""Tangents of spatial and video attention on the CPU engine."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.grid_mask import HeadMasks
from vdcore.ops.call import empty_like
from vdcore.ops.frame_attention.cpu import groups_of, joint
from vdcore.ops.frame_attention.windows_cpu import plan_of
from vdcore.ops.native import native
from vdcore.ops.qk_norm_rope.tangents import Dual
from vdcore.ops.temporal_attention.cpu_tangents import Part, prepared, run_tangents
from vdcore.ops.temporal_attention.tangents import qkv_duals

if TYPE_CHECKING:
    from vdcore.ops.frame_attention import VideoCall


def video_attention(c: VideoCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of out ``(B, rows, H, D)`` and lse ``(B, rows, H)``."""
    qkv = [qkv_duals(c, given, prepared)]
    if c.text is not None:
        text = [_as_video((x, given.get(f"text_{name}"))) for name, x in zip("qkv", c.text)]
        qkv.append((*prepared(text[0], text[1], c.text_norm, None, 0, given, "text_"), text[2]))
    dout, dlse = (empty_like(x) for x in outputs)
    rows = zip(*(joint(c, x) for x in (*outputs, dout, dlse)))
    if isinstance(c.mask, HeadMasks):
        engine = partial(native().tile_attention_tangents, plan=plan_of(c, c.mask))
    else:
        engine = partial(native().frame_attention_tangents, groups=groups_of(c))
    run_tangents(engine, [Part(*x, *mine) for x, mine in zip(qkv, rows)], c.scale)
    return dout, dlse


def _as_video(dual: Dual) -> Dual:
    return dual[0].unsqueeze(1), None if dual[1] is None else dual[1].unsqueeze(1)
