"""For programs that know no operator of vdcore: exported graphs in torch's own operators.

    import vdcore.export

    exported = torch.export.export(model, (), arguments).run_decompositions(vdcore.export.decompositions())
    torch.onnx.export(exported, ...)

Attention becomes torch's under a dense mask, which takes lengths that are known only when the graph runs; everything
else becomes its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import default_decompositions

from vdcore.mask import FrameMask
from vdcore.norm import compute_dtype
from vdcore.ops.choose import BACKENDS, OVERLOADS
from vdcore.ops.cross_attention.cases import FORMS as CROSS
from vdcore.ops.frame_attention.cases import FORMS as FRAMES
from vdcore.ops.operator import DECOMPOSE
from vdcore.ops.temporal_attention.cases import FORMS as TEMPORAL

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: torch's own, and all of vdcore's forward operators.

    Attention over many frames under a mask of frames is N x N there; gated attention takes no lengths. Gradients are
    not in the table.
    """
    table = dict(default_decompositions())
    for op, decompose in DECOMPOSE.items():
        table[OVERLOADS[op]] = decompose(_DENSE.get(op) or BACKENDS["reference"].operators[op].forward)
    return table


Outputs = tuple[Tensor | None, ...]


def _wide(call: Any, *tensors: Tensor) -> list[Tensor]:
    """In the dtype of computation, which torch's forms would round to the model's in between."""
    return [x.to(compute_dtype(call.q.dtype)) for x in tensors]


def _outputs(call: Any, out: Tensor, lse: Tensor) -> Outputs:
    return out.to(call.q.dtype).contiguous(), lse.contiguous() if call.return_lse or call.grad else None


def _temporal(call: Any) -> Outputs:
    found = TEMPORAL["temporal_attention"]["sdpa"](
        *_wide(call, call.q, call.k, call.v),
        mask=call.mask,
        q_start=call.q_start,
        lengths=call.lengths,
        scale=call.scale,
        norm=call.norm,
        rope=call.rope,
        bias=None if call.bias is None else _wide(call, call.bias)[0],
        return_lse=True,
    )
    return _outputs(call, *found)


def _video(call: Any) -> Outputs:
    """The joint sequence ``(B, T*S + L, ...)``; frames on their own, if they see nothing else."""
    qkv = _wide(call, call.q, call.k, call.v)
    common = {"scale": call.scale, "norm": call.norm, "rope": call.rope, "return_lse": True}
    alone = call.mask == FrameMask.same_frame() and call.text is None and call.lengths is None
    if alone and call.k.shape[1] == call.q.shape[1]:
        out, lse = FRAMES["spatial_attention"]["sdpa"](*qkv, **common)
        return _outputs(call, out.flatten(1, 2), lse.flatten(1, 2))
    found = FRAMES["video_attention"]["sdpa"](
        *qkv,
        mask=call.mask,
        q_start=call.q_start,
        lengths=call.lengths,
        text=None if call.text is None else tuple(_wide(call, *call.text)),
        text_lengths=call.text_lengths,
        text_norm=call.text_norm,
        text_first=call.text_first,
        text_sees=call.text_sees,
        **common,
    )
    return _outputs(call, *(_joint(call, x) for x in found))


def _joint(call: Any, x: Any) -> Tensor:
    """``(B, T, S, ...)``, and with a text ``(B, L, ...)`` beside it, as one sequence."""
    if call.text is None:
        return x.flatten(1, 2)
    video, text = x[0].flatten(1, 2), x[1]
    return torch.cat((text, video) if call.text_first else (video, text), 1)


def _cross(call: Any) -> Outputs:
    qkv = _wide(call, call.q, call.k, call.v)
    return _outputs(
        call,
        *CROSS["cross_attention"]["sdpa"](
            *qkv, lengths=call.lengths, scale=call.scale, norm=call.norm, return_lse=True
        ),
    )


_DENSE = {
    "temporal_attention": _temporal,
    "video_attention": _video,
    "spatial_attention": _video,
    "cross_attention": _cross,
}
