"""Open-Sora 1.2 (STDiT3): its spatial and temporal blocks on ``(B, T, S, C)``.

The host rearranges ``B (T S) C`` to ``(B S) T C`` and back around every temporal attention. Tested against blocks with
the attributes and calls of ``opensora/models/stdit/stdit3.py``; the repository itself is not installed in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vdcore
from vdcore.integrations.report import Report
from vdcore.integrations.swap import Change, changed_forward, is_of, is_plain, known_as, swap_model, swap_out
from vdcore.norm import QKNorm
from vdcore.rope import Rope

__all__ = ["swap_in", "swap_out", "why_not"]

BLOCK = "STDiT3Block"


def swap_in(model: nn.Module) -> Report:
    """Puts the blocks of an STDiT3 on vdcore.

    Raises:
        TypeError: if it is no module.
    """
    return swap_model(model, _find)


def _find(name: str, module: Any) -> list[Change] | str | None:
    # Its class is known by name: the repository is not imported here.
    known = known_as(type(module), [base for base in type(module).__mro__ if base.__name__ == BLOCK])
    if not isinstance(known, type):
        return known
    attention = "temporal_attention" if module.temporal else "spatial_attention"
    serves = f"{attention}, modulate, gate_residual"
    return why_not(module) or [Change.of_forward(module, forward, serves)]


def why_not(block: Any) -> str | None:
    """Why a block is not one of those that this file knows."""
    attn = block.attn
    if not is_plain(attn):
        return "its attention has hooks"
    if type(attn).__name__ != "Attention":
        return f"its attention is {type(attn).__name__}"
    if getattr(attn, "qk_norm_legacy", False):
        return "it norms queries and keys after rotating them"
    if getattr(attn, "is_causal", False) or getattr(attn, "attn_drop", nn.Dropout(0)).p:
        return "its attention is causal or drops out probabilities"
    if not (is_of(block.norm1, nn.LayerNorm) and is_of(block.norm2, nn.LayerNorm)):
        return f"its norm is {type(block.norm1).__name__}"
    reason = changed_forward(block) or changed_forward(attn)
    if reason is not None:
        return reason
    if type(attn.q_norm) is not type(attn.k_norm) or (
        type(attn.q_norm) is not nn.Identity and not (hasattr(attn.q_norm, "weight") and _eps(attn.q_norm) is not None)
    ):
        return f"its norm of queries is {type(attn.q_norm).__name__}"
    return None


def forward(
    self: Any,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    mask: Any = None,
    x_mask: Tensor | None = None,
    t0: Tensor | None = None,
    T: int | None = None,
    S: int | None = None,
) -> Tensor | str:
    """A block on tokens ``(B, T*S, C)``; with frames that are given, ``x_mask``, it is the host's."""
    if why_not(self) is not None or not is_plain(self.attn):
        return "its attention has hooks, or was replaced since the swap"
    if x_mask is not None or T is None or S is None:
        return "frames that are given (x_mask)" if x_mask is not None else "a call that names no T and S"
    table = self.scale_shift_table[None] + t.reshape(x.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)  # (B, C)
    x = x.unflatten(1, (T, S))
    x = _residual(self, x, attend(self, _modulated(self.norm1, x, shift, scale)), gate)
    rows = x.flatten(1, 2)
    x = (rows + self.cross_attn(rows, y, mask)).unflatten(1, (T, S))
    x = _residual(self, x, self.mlp(_modulated(self.norm2, x, shift_mlp, scale_mlp)), gate_mlp)
    return x.flatten(1, 2)


def attend(block: Any, x: Tensor) -> Tensor:
    """The block's attention on ``(B, T, S, C)``, its projections packed."""
    attn = block.attn
    packed = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))  # (B, T, S, 3, H, D)
    norm = None
    if not (is_plain(attn.q_norm) and is_plain(attn.k_norm)):
        q, k, v = packed.unbind(3)
        packed = torch.stack((attn.q_norm(q), attn.k_norm(k), v), 3)
    elif type(attn.q_norm) is not nn.Identity:
        norm = QKNorm(attn.q_norm.weight, attn.k_norm.weight, eps=_eps(attn.q_norm) or 0.0)
    rope = rope_of(attn.rotary_emb, x.shape[1], packed) if getattr(attn, "rope", False) else None
    if block.temporal:
        out = vdcore.temporal_attention(packed, norm=norm, rope=rope, scale=attn.scale)
    else:
        out = vdcore.spatial_attention(packed, norm=norm, rope=rope, scale=attn.scale)
    return attn.proj_drop(attn.proj(out.flatten(-2)))


def rope_of(rotate: Any, frames: int, like: Tensor) -> Rope:
    """The table behind a host's rotation of ``(B, H, T, D)``: what it makes of the pair (1, 0) is (cos, sin)."""
    pairs = torch.zeros(1, 1, frames, like.shape[-1], device=like.device, dtype=torch.float32)
    pairs[..., 0::2] = 1
    turned = rotate(pairs)[0, 0, :, None].to(torch.float32)  # (T, 1, D)
    return Rope(turned[..., 0::2], turned[..., 1::2])


def _eps(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    if not is_plain(norm):
        return norm(x) * (1 + scale[:, None, None]) + shift[:, None, None]
    return vdcore.modulate(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def _residual(block: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``x + drop_path(gate * branch)``."""
    if block.training and type(block.drop_path) is not nn.Identity:
        return x + block.drop_path(gate[:, None, None] * branch)
    return vdcore.gate_residual(x, branch, gate)
