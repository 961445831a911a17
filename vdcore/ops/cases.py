"""What operators' cases share: their list, and attention as plain PyTorch users write it.

PyTorch's forms are dense, with masks of all pairs, in the dtype of their inputs. They have the arguments of the public
functions, give the error that the tolerance rule allows, and are what benchmarks compare with: ``naive`` materialises
all scores, ``sdpa`` calls torch's fused attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.grid_mask import HeadMasks
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm, compute_dtype
from vdcore.rope import Rope

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]


# operator, name, how a Draw makes the arguments, tags
DECLARED: list[tuple[str, str, Callable[[Any], dict[str, Any]], tuple[str, ...]]] = []


def case(op: str, name: str, *tags: str) -> Callable[[Any], Any]:
    """Declares a case of an operator: how a :class:`vdcore.testing.cases.Draw` makes its arguments."""

    def declare(build: Any) -> Any:
        DECLARED.append((op, name, build, tags))
        return build

    return declare


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` with all scores in memory: q ``(..., n, D)``, k and v ``(..., m, D)``."""
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = q.to(compute_dtype(q.dtype)) @ k.to(compute_dtype(k.dtype)).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.logsumexp(-1)


def dense(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    return_lse: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``(N, n, H, D)`` to ``(N, m, G, D)``, mask and bias broadcastable to ``(N, H, n, m)``."""
    heads = q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) if x.shape[2] != heads else x for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen, open_mask = None, bias if bias is None else bias.to(q.dtype)  # a bias is a mask of numbers
    if mask is not None:
        seen = mask.any(-1, keepdim=True)
        shown = mask | ~seen  # a row that sees nothing attends to everything, and is thrown away
        open_mask = shown if open_mask is None else torch.where(shown, open_mask, -torch.inf)
    out = attend(q, k, v, open_mask, scale)
    if seen is not None:
        out = torch.where(seen, out, torch.zeros_like(out))
    lse = None
    if return_lse:
        lse = _log_sum_exp(q, k, open_mask, scale)
        if seen is not None:
            lse = torch.where(seen[..., 0], lse, torch.full_like(lse, -torch.inf))
        lse = lse.transpose(1, 2)
    return out.transpose(1, 2), lse


def norm_rope(q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, start: int) -> tuple[Tensor, Tensor]:
    """As hosts do it: in float32, rounded to the model's dtype."""
    dtype = q.dtype
    if norm is not None:
        q, k = norm.q(q), norm.k(k)
    if rope is not None:
        q, k = rope.rotate(q, start), rope.rotate(k)
    return q.to(dtype), k.to(dtype)


def frame_mask(
    mask: FrameMask, T: int, T_k: int, start: int, lengths: Tensor | None, device: torch.device
) -> Tensor | None:
    """``(1 or B, T, T_k)`` or None for all."""
    if mask == FrameMask() and lengths is None:
        return None
    seen = mask.visible(T, T_k, start).to(device)[None]
    if lengths is not None:
        valid = torch.arange(T_k, device=device) < lengths[:, None]
        alive = torch.arange(start, start + T, device=device) < lengths[:, None]
        seen = seen & valid[:, None, :] & alive[:, :, None]
    return seen


def token_mask(
    mask: FrameMask | HeadMasks, T: int, T_k: int, S: int, start: int, lengths: Tensor | None, device: torch.device
) -> Tensor | None:
    """Of all tokens: ``(1 or B, 1 or H, T*S, T_k*S)``, or None for all."""
    if isinstance(mask, FrameMask):
        frames = frame_mask(mask, T, T_k, start, lengths, device)
        return None if frames is None else frames.repeat_interleave(S, 1).repeat_interleave(S, 2)[:, None]
    each = [one.visible(T, *mask.grid, T_k, start).expand(heads, T * S, T_k * S) for heads, one in mask.groups]
    seen = torch.cat(each).to(device)[None]
    if lengths is not None:
        among = frame_mask(FrameMask(), T, T_k, start, lengths, device)
        assert among is not None
        seen = seen & among.repeat_interleave(S, 1).repeat_interleave(S, 2)[:, None]
    return seen


def unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (q, k, v) if k is not None and v is not None else q.unbind(3)  # type: ignore[return-value]


def with_each(form: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A form whose first argument is how it attends, as ``naive`` and as ``sdpa``."""

    def with_naive(*args: Any, **kwargs: Any) -> Any:
        return form(naive, *args, **kwargs)

    def with_sdpa(*args: Any, **kwargs: Any) -> Any:
        return form(sdpa, *args, **kwargs)

    return {"naive": with_naive, "sdpa": with_sdpa}
