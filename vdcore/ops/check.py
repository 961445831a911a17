"""Argument checks: one wording for every error. Each names operator, argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from vdcore.grid_mask import GridMask, HeadMasks
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops.call import QKV, Triple
from vdcore.rope import Rope

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def wrong(op: str, name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{op}: {name} must be {expected}, got {got}")


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_tensor(op: str, name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    return x


def check_main(op: str, name: str, x: Any, dims: str) -> Tensor:
    """A floating tensor of as many dimensions as ``dims`` names, e.g. ``"(B, T, S, H, D)"``."""
    if isinstance(x, Tensor) and x.dtype in FLOATS and x.ndim == dims.count(",") + 1:
        return x
    check_tensor(op, name, x)
    check_dims(op, name, x, dims)
    raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def check_dims(op: str, name: str, x: Tensor, dims: str) -> None:
    if x.ndim != dims.count(",") + 1:
        wrong(op, name, dims, shape_of(x))


def check_like(op: str, name: str, x: Any, main: Tensor, main_name: str, *, or_float32: bool = False) -> Tensor:
    """On the main tensor's device and in its dtype, or in float32 as well."""
    check_tensor(op, name, x)
    if x.device != main.device:
        wrong(op, name, f"on {main_name}'s device {main.device}", x.device)
    if x.dtype != main.dtype and not (or_float32 and x.dtype == torch.float32):
        wide = or_float32 and main.dtype != torch.float32
        expected = f"{main.dtype}, as {main_name}" + (", or torch.float32" if wide else "")
        raise TypeError(f"{op}: {name} must be {expected}, got {x.dtype}")
    return x


def check_shape(op: str, name: str, x: Tensor, shape: Sequence[int], dims: str) -> None:
    if x.shape != tuple(shape):
        wrong(op, name, f"{dims} = {tuple(shape)}", shape_of(x))


def check_attention(
    op: str, q: Any, k: Any, v: Any, mask: Any, q_start: Any, lengths: Any, scale: Any, norm: Any, rope: Any
) -> tuple[QKV, FrameMask, int, Tensor | None, float, QKNorm | None, Rope | None]:
    """The arguments of an :class:`AttentionCall`, checked, in its order, with all defaults filled in."""
    qkv = check_qkv(op, *autocast(check_tensor(op, "q", q), k, v))
    q = qkv.main
    B, T, S, H, D, T_k, G = qkv.sizes
    check_mask_type(op, mask)
    if q_start is None:
        q_start = max(T_k - T, 0)
    else:
        check_start(op, "q_start", q_start)
    check_teacher_forcing(op, mask, T, T_k, q_start)
    if lengths is not None:
        check_lengths(op, "lengths", lengths, [(B,)], "(B,)", q)
    if norm is not None:
        check_norm(op, norm, q, H, G, D)
    if rope is not None:
        rope = check_rope(op, rope, q, max(T_k, q_start + T), S, H, G, D)
    return qkv, mask, q_start, lengths, check_scale(op, scale, D), norm, rope


def check_bias(op: str, bias: Any, qkv: QKV) -> None:
    """``(H or 1, T, T_k)``"""
    _, T, _, H, _, T_k, _ = qkv.sizes
    check_like(op, "bias", bias, qkv.main, "q", or_float32=True)
    check_dims(op, "bias", bias, "(H or 1, T, T_k)")
    heads = 1 if bias.shape[0] == 1 else H
    check_shape(op, "bias", bias, (heads, T, T_k), "(H or 1, T, T_k)")


def check_teacher_forcing(op: str, mask: FrameMask, T: int, T_k: int, q_start: int) -> None:
    if mask.clean and (wrong_frames := mask.beyond(T, T_k, q_start)):
        wrong(op, "mask", f"one of teacher forcing over at most 2 * {mask.clean} frames", wrong_frames)


def check_mask_type(op: str, mask: Any, *, grids: bool = False) -> None:
    """A FrameMask; where an operator has ``grids`` also a GridMask, or pairs (heads, mask)."""
    if isinstance(mask, FrameMask) or (grids and isinstance(mask, (GridMask, tuple, list))):
        return
    expected = "a FrameMask, a GridMask or a tuple of pairs (heads, mask)" if grids else "a FrameMask"
    raise TypeError(f"{op}: mask must be {expected}, got {type(mask).__name__}")


def check_grid(op: str, grid: Any, S: int, *, needed: str = "") -> tuple[int, int] | None:
    """``(rows, columns)`` of S tokens; needed: what it must be given for."""
    if grid is None:
        if needed:
            wrong(op, "grid", f"(rows, columns) {needed}", None)
        return None
    sizes = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(sizes) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in sizes):
        raise TypeError(f"{op}: grid must be a tuple of two ints (rows, columns), got {grid!r}")
    if min(sizes) < 0 or sizes[0] * sizes[1] != S:
        wrong(op, "grid", f"(rows, columns) with rows * columns = S = {S}", sizes)
    return int(sizes[0]), int(sizes[1])  # torch.compile specialises on them


def check_grid_mask(op: str, mask: Any, grid: Any, S: int, H: int, G: int) -> FrameMask | HeadMasks:
    """What of all these is a mask of frames alone is that."""
    if isinstance(mask, FrameMask):
        check_grid(op, grid, S)
        return mask
    grouped = isinstance(mask, (tuple, list))
    pairs = _check_pairs(op, mask, H, G) if grouped else [(H, mask)]
    has_grid = any(isinstance(one, GridMask) for _, one in pairs)
    grid = check_grid(op, grid, S, needed="with a GridMask" if has_grid else "")
    groups: list[tuple[int, GridMask]] = []
    for heads, one in pairs:
        whole = one if isinstance(one, GridMask) else GridMask(one)
        if groups and groups[-1][1] == whole:
            groups[-1] = groups[-1][0] + heads, whole
        elif heads:
            groups.append((heads, whole))
    if not groups:  # no heads
        return pairs[0][1] if isinstance(pairs[0][1], FrameMask) else pairs[0][1].frames
    if len(groups) == 1 and groups[0][1].frames_alone:
        return groups[0][1].frames
    return HeadMasks((1, int(S)) if grid is None else grid, tuple(groups))


def _check_pairs(op: str, pairs: Any, H: int, G: int) -> list[tuple[int, Any]]:
    shared = H // G if G else 1
    expected = "a tuple of pairs (count, FrameMask or GridMask)"
    if not pairs:
        wrong(op, "mask", expected, "none")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], (FrameMask, GridMask)):
            raise TypeError(f"{op}: mask must be {expected}, got {pair!r} as its entry {i}")
        if isinstance(pair[0], bool) or not isinstance(pair[0], int):
            raise TypeError(f"{op}: mask[{i}] must have an int as its count, got {pair[0]!r}")
        if pair[0] < 0 or pair[0] % shared:
            wrong(op, f"mask[{i}]", f"of a multiple of H // G = {shared} query heads", pair[0])
    total = sum(count for count, _ in pairs)
    if total != H:
        wrong(op, "mask", f"of H = {H} query heads in all", total)
    return [(count, one) for count, one in pairs]


def check_qkv(op: str, q: Any, k: Any, v: Any, *, prefix: str = "") -> QKV:
    """q ``(B, T, S, H, D)`` with k and v ``(B, T_k, S, G, D)``, or q packed ``(B, T, S, 3, H, D)``."""
    name = prefix + "q"
    if k is None or v is None:
        if k is not None or v is not None:
            wrong(op, f"{prefix}k and {prefix}v", f"both given, or neither with {name} packed", "one of them")
        check_main(op, name, q, "(B, T, S, 3, H, D)")
        if q.shape[3] != 3:
            wrong(op, name, "(B, T, S, 3, H, D) when k and v are None", shape_of(q))
        return QKV(unit_stride(q))
    check_main(op, name, q, "(B, T, S, H, D)")
    if not (_alike(q, k) and _alike(q, v)):
        _check_keys(op, prefix, q, k, v)
    return QKV(unit_stride(q), unit_stride(k), unit_stride(v))


def _check_keys(op: str, prefix: str, q: Tensor, k: Any, v: Any) -> None:
    for name, x in ((prefix + "k", k), (prefix + "v", v)):
        check_like(op, name, x, q, prefix + "q")
        check_dims(op, name, x, "(B, T_k, S, G, D)")
    B, _, S, H, D = q.shape
    _, T_k, _, G, _ = k.shape
    check_shape(op, prefix + "k", k, (B, T_k, S, G, D), "(B, T_k, S, G, D)")
    check_shape(op, prefix + "v", v, k.shape, f"the shape of {prefix}k")
    check_groups(op, prefix + "k", G, H)


def _alike(x: Tensor, y: Any) -> bool:
    """Tensors of one shape, dtype and device: most calls, and soon seen."""
    return isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype and y.device == x.device


def check_groups(op: str, name: str, G: int, H: int) -> None:
    if (G == 0 and H != 0) or (G != 0 and H % G):
        wrong(op, name, f"given with a number of heads G that divides H = {H}", f"G = {G}")


def check_norm(op: str, norm: Any, q: Tensor, H: int, G: int, D: int, *, name: str = "norm") -> QKNorm | None:
    if norm is None:
        return None
    if not isinstance(norm, QKNorm):
        raise TypeError(f"{op}: {name} must be a QKNorm or None, got {type(norm).__name__}")
    for field, heads, letter in (("q_weight", H, "H"), ("k_weight", G, "G"), ("q_bias", H, "H"), ("k_bias", G, "G")):
        x = getattr(norm, field)
        if x is None:
            continue
        check_like(op, f"{name}.{field}", x, q, "q", or_float32=True)
        if norm.over == "head":
            check_shape(op, f"{name}.{field}", x, (D,), "(D,)")
        else:
            check_shape(op, f"{name}.{field}", x, (heads * D,), f"({letter}*D,)")
    return norm


def check_rope(
    op: str, rope: Any, q: Tensor, frames: int, S: int, H: int, G: int, D: int, *, name: str = "rope"
) -> Rope | None:
    """``frames``: rows the table must have, unless it has one for all. Both tables come out with the same strides."""
    if rope is None:
        return None
    if not isinstance(rope, Rope):
        raise TypeError(f"{op}: {name} must be a Rope or None, got {type(rope).__name__}")
    for field in ("cos", "sin"):
        check_like(op, f"{name}.{field}", getattr(rope, field), q, "q", or_float32=True)
    shape = rope.cos.shape
    if shape[0] != 1 and shape[0] < frames:
        wrong(op, f"{name}.cos", f"a table of 1 or at least {frames} frames", shape_of(rope.cos))
    if shape[1] not in (1, S):
        wrong(op, f"{name}.cos", f"a table of 1 or S = {S} tokens", shape_of(rope.cos))
    if len(shape) == 4 and (shape[2] != H or G != H):
        wrong(op, f"{name}.cos", f"a table of H = {H} heads, and G = H", f"{shape_of(rope.cos)} with G = {G}")
    if 2 * shape[-1] > D:
        wrong(op, f"{name}.cos", f"a table of at most D/2 = {D // 2} pairs", shape_of(rope.cos))
    if shape[-1] == 0:
        return None
    if rope.cos.stride() == rope.sin.stride() and rope.cos.stride(-1) == 1:
        return rope
    return Rope(rope.cos.contiguous(), rope.sin.contiguous(), rope.style)


def check_lengths(
    op: str, name: str, lengths: Any, shape: Sequence[Sequence[int]], dims: str, main: Tensor
) -> Tensor | None:
    """Integer tensor of one of the shapes."""
    if lengths is None:
        return None
    check_tensor(op, name, lengths)
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, got {lengths.dtype}")
    if tuple(lengths.shape) not in [tuple(s) for s in shape]:
        wrong(op, name, f"{dims} = {' or '.join(str(tuple(s)) for s in shape)}", shape_of(lengths))
    if lengths.device != main.device:
        wrong(op, name, f"on q's device {main.device}", lengths.device)
    return lengths


def check_text(
    op: str, text: Any, text_lengths: Any, text_norm: Any, text_sees: Any, q: Tensor, G: int
) -> tuple[Triple | None, Tensor | None, QKNorm | None]:
    """The text beside a video with queries q, its valid tokens and its norm."""
    if text_sees not in ("all", "text"):
        wrong(op, "text_sees", "'all' or 'text'", repr(text_sees))
    if text is None:
        if text_lengths is not None or text_norm is not None:
            wrong(op, "text_lengths" if text_lengths is not None else "text_norm", "None without text", "a value")
        return None, None, None
    if not isinstance(text, (tuple, list)) or len(text) != 3:
        got = f"{len(text)} of them" if isinstance(text, (tuple, list)) else type(text).__name__
        raise TypeError(f"{op}: text must be a tuple (q, k, v) or None, got {got}")
    B, _, _, H, D = q.shape
    found = autocast(*(check_tensor(op, f"text[{i}]", x) for i, x in enumerate(text)))
    for i, (x, heads, letter) in enumerate(zip(found, (H, G, G), "HGG")):
        check_like(op, f"text[{i}]", x, q, "q")
        if x.ndim != 4:
            wrong(op, f"text[{i}]", f"(B, L, {letter}, D)", shape_of(x))
        check_shape(op, f"text[{i}]", x, (B, found[0].shape[1], heads, D), f"(B, L, {letter}, D)")
    text_lengths = check_lengths(op, "text_lengths", text_lengths, [(B,)], "(B,)", q)
    text_norm = check_norm(op, text_norm, q, H, G, D, name="text_norm")
    return (unit_stride(found[0]), unit_stride(found[1]), unit_stride(found[2])), text_lengths, text_norm


def check_scale(op: str, scale: Any, D: int) -> float:
    if scale is None:
        return D**-0.5 if D else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a number, got {type(scale).__name__}")
    return float(scale)


def check_start(op: str, name: str, start: Any) -> None:
    if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(start).__name__}")
    if start < 0:
        wrong(op, name, "at least 0", start)


def unit_stride(x: Tensor) -> Tensor:
    """x itself, or its copy where the innermost stride is not 1."""
    return x if x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the autocast dtype of their device, where autocast is on; float64 stays."""
    device = "cpu" if tensors[0].is_cpu else tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products are of the dtypes that they are given in."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
