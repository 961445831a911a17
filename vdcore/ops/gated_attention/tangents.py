"""Tangents of gated attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vdcore.norm import compute_dtype
from vdcore.ops.choose import BACKENDS
from vdcore.ops.frame_attention.tangents import video_attention
from vdcore.ops.temporal_attention.tangents import temporal_attention


def gated_attention(call: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``gate ds + (1 - gate) dt + dgate (s - t)``, of the spatial result s and the temporal one t, ``(B, T, S, H, D)``;
    then ds, and the tangents of both lse, ``(B, T, S, H)``."""
    dtype, shape = compute_dtype(call.main.dtype), call.main.shape
    spatial, temporal = (tuple(x.to(dtype) for x in triple) for triple in (call.spatial, call.temporal))
    parts = replace(call, spatial=spatial, temporal=temporal).parts()  # the mix rounds once, at the end
    found = []
    for part, prefix, tangents in zip(parts, ("spatial_", "temporal_"), (video_attention, temporal_attention)):
        below = {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}
        found.append(tangents(part, below))
    (ds, spatial_lse), (dt, temporal_lse) = found
    ds, kept = ds.reshape(shape), call.main.dtype

    def primals() -> tuple[Tensor, Tensor]:
        s, t = (BACKENDS["reference"].operators[part.op].formula(part)[0] for part in parts)  # type: ignore[misc]
        return s.reshape(shape), t

    out = mixed(call, ds, dt, given, primals)
    return out.to(kept), ds.to(kept), spatial_lse.reshape(shape[:-1]), temporal_lse


Push = Callable[[Any, tuple[Tensor, ...], dict[str, Tensor]], tuple[Tensor, ...]]


def by_parts(
    call: Any, outputs: tuple[Tensor, ...], t: Tensor, given: dict[str, Tensor], of_spatial: Push, of_temporal: Push
) -> tuple[Tensor, ...]:
    """The same by an engine, of forward's outputs and the temporal result t ``(B, T, S, H, D)``."""
    _, s, lse, temporal_lse = outputs
    spatial, temporal = call.parts()

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}

    ds, dlse = of_spatial(spatial, (s.flatten(1, 2), lse.flatten(1, 2)), below("spatial_"))
    dt, temporal_dlse = of_temporal(temporal, (t, temporal_lse), below("temporal_"))
    ds, dtype = ds.view(s.shape), compute_dtype(s.dtype)
    out = mixed(call, ds.to(dtype), dt.to(dtype), given, lambda: (s.to(dtype), t.to(dtype)))
    return out.to(s.dtype), ds, dlse.view(lse.shape), temporal_dlse


def mixed(
    call: Any, ds: Tensor, dt: Tensor, given: dict[str, Tensor], primals: Callable[[], tuple[Tensor, Tensor]]
) -> Tensor:
    """The result's tangent, ``(B, T, S, H, D)``; ``primals`` gives s and t, which the gate's alone needs."""
    out = torch.lerp(dt, ds, call.gate.to(ds.dtype))
    if "gate" in given:
        s, t = primals()
        out = out + given["gate"].to(ds.dtype) * (s - t)
    return out
