"""Whom vdcore is measured against, each at its best setting.

A peer takes the public function's own arguments and returns its result in the same layout, permutes and copies
included. Where one library can be called in several ways, every way is a variant, and the fastest one counts.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdcore import FrameMask
from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import (
    Attend,
    Function,
    Makers,
    dense_mask,
    dense_only,
    masked,
    materialised,
    norm_rope,
    run_by_run,
    sample_by_sample,
    text_tokens,
    unit,
    whole_job,
)

ATTENTION = ("spatial_attention", "temporal_attention", "video_attention", "gated_attention", "cross_attention")


@dataclass(frozen=True)
class Peer:
    """One library, or one way of writing it in PyTorch.

    Args:
        variants: makers of functions by how they call it; made for a job: its mask is built once, as models do.
        why_not: the reason why it cannot run a job here, or None.
        workspace: bytes it needs beside inputs and outputs, where that is known to matter.
        module: what has to be installed.
        slow_start: it compiles for many seconds.
    """

    name: str
    ops: tuple[str, ...]
    variants: Callable[[Job], Makers]
    why_not: Callable[[Job], str | None] = lambda job: None
    workspace: Callable[[Job], int] = lambda job: 0
    module: str = "torch"
    slow_start: bool = False


# ---- Attention in PyTorch ----


def narrow(job: Job) -> bool:
    """In half precision on a CPU, where computing in float32 is often faster, casts included."""
    return job.device == "cpu" and job.dtype != torch.float32


def _in_float32(attend: Attend) -> Attend:
    def widened(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attend(q.float(), k.float(), v.float(), scale).to(q.dtype)

    return widened


def _naive(job: Job) -> Makers:
    def naive() -> Attend:
        seen = dense_mask(job)
        hidden = None if seen is None else ~seen
        del seen

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            scores = q @ k.mT * scale
            if hidden is not None:
                scores = scores.masked_fill(hidden, -math.inf)
            return (scores.softmax(-1) @ v).transpose(1, 2)

        return attend

    found: Makers = {"eager": lambda: whole_job(job.op, naive())}
    if narrow(job):
        found["in float32"] = lambda: whole_job(job.op, _in_float32(naive()))
    return found


_BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, ("cpu", "cuda")),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "math": (SDPBackend.MATH, ("cpu", "cuda")),
}


def _sdpa(backend: SDPBackend) -> Callable[[Job], Makers]:
    def variants(job: Job) -> Makers:
        def call(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
            groups = q.shape[1] != k.shape[1]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups)

        def views(mask: Tensor | None) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
                return call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, mask).transpose(1, 2)

            return attend

        def copies(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            return call(q, k, v, scale, None).transpose(1, 2)

        def strided() -> Function:
            return whole_job(job.op, views(dense_mask(job)))

        found: Makers = {}
        if masked(job):
            if not text_tokens(job):
                found["one call a run"] = lambda: whole_job(job.op, run_by_run(views(None), job))
            if backend != SDPBackend.FLASH_ATTENTION or job.device == "cpu":
                found["dense mask"] = strided
            return found
        found["strided"] = strided
        if backend == SDPBackend.MATH:  # seldom the fastest, but its backward is, compiled, in float32 on a CPU
            if job.op == "temporal_attention" and job.has_backward and not narrow(job):
                found["compiled"] = lambda: compiled(strided())
            return found
        if job.op == "temporal_attention" and job.shape.B > 1:
            found["one call a sample"] = lambda: sample_by_sample(job.op, views(None))
        found["permuted copies"] = lambda: whole_job(job.op, copies)
        # Compiling takes seconds each, so only where there is something to fuse, or where it has been the fastest.
        if not (narrow(job) and job.has_backward):
            found["compiled"] = lambda: compiled(strided())
        if narrow(job):
            in_float32 = whole_job(job.op, _in_float32(views(None)))
            found["in float32"] = lambda: in_float32
            found["in float32, permuted copies"] = lambda: whole_job(job.op, _in_float32(copies))
            if job.norm_rope or job.has_backward:
                found["in float32, compiled"] = lambda: compiled(in_float32)
        return found

    return variants


def _sdpa_why_not(devices: tuple[str, ...]) -> Callable[[Job], str | None]:
    def why_not(job: Job) -> str | None:
        device = torch.device(job.device).type
        return None if device in devices else f"torch has it on {' and '.join(devices)} only"

    return why_not


def compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _flex(job: Job) -> Makers:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def block_mask() -> Any:
        if not masked(job):
            return None
        mask, tokens, video = job.mask, unit(job), job.shape.T * unit(job)
        text = text_tokens(job)
        seen = mask.visible(job.shape.T).to(job.device)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            frames = (x.clamp(max=video - 1) // tokens for x in (i, j))
            return (i >= video) | (j >= video) | seen[tuple(frames)]

        n = video + text
        return create_block_mask(visible, None, None, n, n, device=job.device)

    def make() -> Function:
        flex, blocks = compiled(flex_attention), block_mask()

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            gqa = q.shape[2] != k.shape[2]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return flex(q, k, v, block_mask=blocks, scale=scale, enable_gqa=gqa).transpose(1, 2)

        # Compiled apart: in one graph with norm and rope, Inductor fails to lower FlexAttention on the CPU.
        return whole_job(job.op, attend, compiled(norm_rope) if job.norm_rope else norm_rope)

    return {"compiled": make}


def _flex_why_not(job: Job) -> str | None:
    if torch.device(job.device).type == "cpu" and job.has_backward:
        return "FlexAttention has no backward on the CPU"
    return None


# ---- Attention libraries ----


def _library(module: str, *, needs_half: bool = True, backward: bool = True) -> Callable[[Job], str | None]:
    def why_not(job: Job) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if torch.device(job.device).type != "cuda":
            return "it runs on NVIDIA GPUs only"
        if needs_half and job.dtype == torch.float32:
            return "it takes float16 and bfloat16 only"
        if job.has_backward and not backward:
            return "it has no backward"
        return None

    return why_not


def _flash_attn(module: str) -> Callable[[Job], Makers]:
    def variants(job: Job) -> Makers:
        function = importlib.import_module(module).flash_attn_func
        mask, arguments = job.mask, dict[str, Any]()
        windows = masked(job) and unit(job) == 1 and mask.chunk == 1 and not mask.sink
        if windows:  # its rows are frames, so its windows are ours
            past, future = (-1 if x is None else x for x in (mask.past, mask.future))
            arguments = {"window_size": (past, future)}

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            out = function(q, k, v, softmax_scale=scale, **arguments)
            return out[0] if isinstance(out, tuple) else out

        return {"window": lambda: whole_job(job.op, attend)} if windows else dense_only(job, attend)

    return variants


def _xformers(job: Job) -> Makers:
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = (x if x.shape[2] == q.shape[2] else x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        return memory_efficient_attention(q, k, v, scale=scale)

    return dense_only(job, attend)


def _sage(job: Job) -> Makers:
    from sageattention import sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return sageattn(q, k, v, tensor_layout="NHD", sm_scale=scale)

    return dense_only(job, attend)


def _natten(job: Job) -> Makers:
    from natten import na3d

    s, mask = job.shape, job.mask
    frames = s.T if mask.past is None else mask.past + 1

    def attention(q: Tensor, k: Any = None, v: Any = None, *, norm: Any, rope: Any, mask: FrameMask) -> Tensor:
        q, k, v = (q, k, v) if k is not None else q.unbind(3)
        q, k = norm_rope(q, k, norm, rope)
        q, k, v = (x.unflatten(2, (s.rows, s.columns)).contiguous() for x in (q, k, v))
        window = {"kernel_size": (frames, s.rows, s.columns), "is_causal": (mask.future == 0, False, False)}
        return na3d(q, k, v, scale=s.D**-0.5, **window).flatten(2, 3)

    return {"whole frames as the window": lambda: attention}


def _natten_why_not(job: Job) -> str | None:
    reason = _library("natten", needs_half=False)(job)
    if reason is not None:
        return reason
    mask = job.mask
    if masked(job) and (mask.future != 0 or mask.chunk > 1 or mask.sink or (mask.past or 0) >= job.shape.T):
        return "its windows are causal windows of frames, without chunks and sinks"
    if text_tokens(job) or job.shape.G != job.shape.H:
        return "it has neither text nor grouped heads"
    return None


# ---- The other operators ----


def _wide(function: Function) -> Function:
    """In float32 and back, as :func:`_in_float32`, for any function of tensors."""

    def widened(*args: Any, **kwargs: Any) -> Tensor:
        dtype = next(x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        wide = {name: x.float() if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        return function(*(x.float() if isinstance(x, Tensor) else x for x in args), **wide).to(dtype)

    return widened


def _eager_or_compiled(name: str, functions: dict[str, Function], op: str) -> list[Peer]:
    """Two peers: every function as it is, and the first one compiled (in float32 as well, if that is among them)."""

    def eager(job: Job) -> Makers:
        return {variant: lambda f=f: f for variant, f in _fitting(functions, job).items()}  # type: ignore[misc]

    def compile_first(job: Job) -> Makers:
        first = next(iter(functions))
        some = {name: f for name, f in _fitting(functions, job).items() if name in (first, "in float32")}
        return {f"{variant}, compiled": lambda f=f: compiled(f) for variant, f in some.items()}  # type: ignore[misc]

    return [Peer(name, (op,), eager), Peer("compiled", (op,), compile_first)]


def _fitting(functions: dict[str, Function], job: Job) -> dict[str, Function]:
    return {name: f for name, f in functions.items() if narrow(job) or name != "in float32"}


def _qk_norm_rope(q: Tensor, k: Tensor, norm: Any, rope: Any) -> tuple[Tensor, Tensor]:
    q, k = norm_rope(q, k, norm, rope)
    return q.contiguous(), k.contiguous()


def _conv3d(memory_format: torch.memory_format) -> Function:
    def patchify(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        video, weight = (x.contiguous(memory_format=memory_format) for x in (video, weight))
        y = F.conv3d(video, weight, bias, stride=weight.shape[2:])
        return y.flatten(3).permute(0, 2, 3, 1).contiguous()

    return patchify


def _patches_linear(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, C, T, H, W = video.shape
    pt, ph, pw = weight.shape[2:]
    patches = video.reshape(B, C, T // pt, pt, H // ph, ph, W // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return F.linear(patches.reshape(B, T // pt, (H // ph) * (W // pw), C * pt * ph * pw), weight.flatten(1), bias)


def _linear_patches(tokens: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: Any, grid: Any) -> Tensor:
    y = F.linear(tokens, weight, bias).reshape(tokens.shape[0], *grid, *patch, channels)
    sizes = [n * p for n, p in zip(grid, patch)]
    return y.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(tokens.shape[0], channels, *sizes)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None, None]) + shift[:, None, None]


def _gate_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return residual + gate[:, None, None] * x


def _addcmul(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(residual, gate[:, None, None], x)


# The strongest first: where the clock cuts a job's peers, the last are missing.
PEERS: list[Peer] = [
    *(
        Peer(
            f"sdpa[{name}]",
            ATTENTION,
            _sdpa(backend),
            _sdpa_why_not(devices),
            workspace=materialised if name == "math" else lambda job: 0,
        )
        for name, (backend, devices) in _BACKENDS.items()
    ),
    Peer("naive", ATTENTION, _naive, workspace=materialised),
    Peer("flex", ATTENTION, _flex, _flex_why_not, slow_start=True),
    Peer("flash-attn-2", ATTENTION, _flash_attn("flash_attn"), _library("flash_attn"), module="flash_attn"),
    Peer(
        *("flash-attn-3", ATTENTION, _flash_attn("flash_attn_interface"), _library("flash_attn_interface")),
        module="flash_attn_interface",
    ),
    Peer("xformers", ATTENTION, _xformers, _library("xformers", needs_half=False), module="xformers"),
    Peer("natten", ("video_attention",), _natten, _natten_why_not, module="natten"),
    Peer("sageattention", ATTENTION, _sage, _library("sageattention", backward=False), module="sageattention"),
    *_eager_or_compiled("eager", {"formula": _qk_norm_rope}, "qk_norm_rope"),
    *_eager_or_compiled(
        "linear", {"reshape + linear": _patches_linear, "in float32": _wide(_patches_linear)}, "patchify"
    ),
    Peer(
        *("conv3d", ("patchify",)),
        lambda job: {
            "channels first": lambda: _conv3d(torch.contiguous_format),
            "channels last": lambda: _conv3d(torch.channels_last_3d),
        },
    ),
    *_eager_or_compiled(
        "linear", {"linear + permute": _linear_patches, "in float32": _wide(_linear_patches)}, "unpatchify"
    ),
    *_eager_or_compiled("eager", {"layer_norm": _modulate}, "modulate"),
    *_eager_or_compiled("eager", {"formula": _gate_residual, "addcmul": _addcmul}, "gate_residual"),
]


def names() -> list[str]:
    """What ``--peer`` takes: vdcore, the yardstick `copy`, and every peer, also without its ``[backend]``."""
    found = ["vdcore", "copy"]
    for peer in PEERS:
        family = peer.name.partition("[")[0]
        found += [name for name in (family, peer.name) if name not in found]
    return found
