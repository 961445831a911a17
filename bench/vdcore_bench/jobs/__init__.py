"""The operators as jobs: one class a family, and :func:`make`, which cuts a workload to the machine.

A new operator joins the benchmark by a class here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch

from vdcore import FrameMask, GridMask
from vdcore.ops.choose import BACKENDS
from vdcore_bench.jobs.base import Cuts, Job, Tensors, mask_text
from vdcore_bench.workloads import Budget, Shape, Workload, scaled


def positions(n: int, most: int = 16) -> list[int]:
    """At most so many of n, evenly from the first to the last."""
    return sorted({i * (n - 1) // max(most - 1, 1) for i in range(most)}) if n > most else list(range(n))


class _SelfAttention(Job):
    def sizes(self) -> dict[str, tuple[int, ...]]:
        return self.projection_sizes()

    def arguments(self, t: Tensors) -> dict[str, Any]:
        args: dict[str, Any] = {"norm": self.norm(t), "rope": self.rope(t)}
        return {**({"q": t["qkv"]} if "qkv" in t else dict(zip("qkv", self.qkv(t)))), **args}

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        s = self.shape
        return ((s.B, s.T, s.S, s.H, s.D),)

    def pairs(self) -> float:
        """Visible pairs of one head."""
        raise NotImplementedError

    def forward_flops(self) -> float:
        return 4.0 * self.shape.D * self.shape.H * self.pairs()

    def backward_flops(self) -> float:
        return 2.5 * self.forward_flops()

    @property
    def case(self) -> str:
        parts = [mask_text(self.grid_mask or self.mask), "norm + rope" if self.norm_rope else ""]
        return "; ".join(filter(None, parts)) or "plain"


class TemporalJob(_SelfAttention):
    @classmethod
    def mask_of(cls, workload: Workload) -> FrameMask:
        return FrameMask.full() if workload.factorized else workload.mask

    def arguments(self, t: Tensors) -> dict[str, Any]:
        return {**super().arguments(t), "mask": self.mask}

    def rope_dims(self) -> tuple[int, int, int]:
        return (self.shape.D // 2 * 2, 0, 0)

    def pairs(self) -> float:
        s = self.shape
        return s.B * s.S * s.T**2 * self.mask.density(s.T)

    def cuts(self) -> Cuts:
        at = {2: positions(self.shape.S)}
        names = tuple(self.sizes())
        return Cuts(dict.fromkeys(names, at), (at,), frozenset(names))


class SpatialJob(_SelfAttention):
    AXES = ("T", "heads", "rows")
    MEMORY_BOUND = False

    def rope_dims(self) -> tuple[int, int, int]:
        half = self.shape.D // 4 * 2
        return (0, half, half)

    def pairs(self) -> float:
        return self.shape.B * self.shape.T * self.shape.S**2

    def cuts(self) -> Cuts:
        heads = self.head_cuts()
        at = {name: {1: [0], **heads.get(name, {})} for name in self.sizes()}
        return Cuts(at, ({1: [0], **self.output_heads()},), frozenset(self.sizes()))


class VideoJob(_SelfAttention):
    AXES = ("heads", "rows", "T")
    MEMORY_BOUND = False

    @classmethod
    def mask_of(cls, workload: Workload) -> FrameMask:
        return workload.mask

    @property
    def text(self) -> bool:
        return self.workload.joint_text and self.shape.L > 0

    @property
    def case(self) -> str:
        return super().case + ("; text" if self.text else "")

    def sizes(self) -> dict[str, tuple[int, ...]]:
        found = self.projection_sizes()
        if self.text:  # as the video's, without frames
            found |= {f"text_{name}": (n[0], self.shape.L, *n[3:]) for name, n in found.items()}
        return found

    def arguments(self, t: Tensors) -> dict[str, Any]:
        args = {**super().arguments(t), "mask": self.mask}
        if self.grid_mask is not None:
            args |= {"mask": self.grid_mask, "grid": (self.shape.rows, self.shape.columns)}
        if self.text:
            args |= {"text": self.qkv(t, "text_"), "text_norm": self.norm(t)}
        return args

    @property
    def density(self) -> float:
        """Visible pairs of video tokens over all of them."""
        s = self.shape
        return self.mask.density(s.T) if self.grid_mask is None else self.grid_mask.density(s.T, s.rows, s.columns)

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        s = self.shape
        return (*super().output_sizes(), (s.B, s.L, s.H, s.D)) if self.text else super().output_sizes()

    def pairs(self) -> float:
        s = self.shape
        video, text = s.T * s.S, s.L if self.text else 0
        return s.B * (video**2 * self.density + text * (2 * video + text))

    def cuts(self) -> Cuts:
        heads = self.head_cuts()
        at = dict(heads)
        for name, axes in heads.items():
            if self.text:  # one axis less
                at[f"text_{name}"] = {axis - 1: kept for axis, kept in axes.items()}
        whole = self.output_heads()
        text = {axis - 1: kept for axis, kept in whole.items()}
        # Gradients of the float64 reference keep the scores of all frames.
        kept_scores = 3 * 8 * self.pairs() * (self.shape.H // self.shape.G if heads else self.shape.H)
        gradients = frozenset(self.sizes()) if kept_scores <= 4 * 2**30 else frozenset()
        return Cuts(at, (whole, text), gradients)


class GatedJob(_SelfAttention):
    AXES = ("heads", "rows", "T")
    MEMORY_BOUND = False

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {
            **self.projection_sizes("spatial_"),
            **self.projection_sizes("temporal_"),
            "gate": (self.shape.H, 1),  # one gate per head
        }

    def arguments(self, t: Tensors) -> dict[str, Any]:
        spatial, temporal = self.qkv(t, "spatial_"), self.qkv(t, "temporal_")
        norm, rope = self.norm(t), self.rope(t)
        return {"spatial": spatial, "temporal": temporal, "gate": t["gate"], "norm": (norm, norm), "rope": (None, rope)}

    def rope_dims(self) -> tuple[int, int, int]:
        return (self.shape.D // 2 * 2, 0, 0)

    def pairs(self) -> float:
        s = self.shape
        return s.B * (s.T * s.S**2 + s.S * s.T**2)

    def cuts(self) -> Cuts:
        heads = {**self.head_cuts("spatial_"), **self.head_cuts("temporal_")}
        output = self.output_heads()
        at = {**heads, "gate": {0: output[3]}} if output else {}
        # The gate's gradient is one sum per head: too few numbers for the tolerance rule.
        return Cuts(at, (output,), frozenset(self.sizes()) - {"gate"})

    @classmethod
    def why_not(cls, workload: Workload) -> str | None:
        return None if workload.frames > 1 else "it has one frame"


class CrossJob(_SelfAttention):
    AXES = ("rows", "heads", "T")
    MEMORY_BOUND = False
    ROTATES = False

    @property
    def case(self) -> str:
        return "norm" if self.norm_rope else "plain"

    def sizes(self) -> dict[str, tuple[int, ...]]:
        s = self.shape
        return {"q": (s.B, s.T, s.S, s.H, s.D), "kv": (s.B, s.L, 2, s.G, s.D)}

    def arguments(self, t: Tensors) -> dict[str, Any]:
        k, v = t["kv"].unbind(2)
        return {"q": t["q"], "k": k, "v": v, "norm": self.norm(t)}

    def pairs(self) -> float:
        s = self.shape
        return float(s.B * s.T * s.S * s.L)

    def cuts(self) -> Cuts:
        if not self.output_heads():
            return Cuts(gradients=frozenset(self.sizes()))
        at = {"q": self.output_heads(), "kv": {3: [0]}}
        return Cuts(at, (self.output_heads(),), frozenset(self.sizes()))

    @classmethod
    def why_not(cls, workload: Workload) -> str | None:
        return None if workload.text_tokens else "it has no text"


class NormRopeJob(Job):
    """q and k of a packed projection; always with norm and rope."""

    AXES = ("rows", "T", "heads")

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return self.projection_sizes()

    def arguments(self, t: Tensors) -> dict[str, Any]:
        q, k, _ = self.qkv(t)
        return {"q": q, "k": k, "norm": self.norm(t), "rope": self.rope(t)}

    def rope_dims(self) -> tuple[int, int, int]:
        return (self.shape.D // 2 * 2, 0, 0) if self.workload.factorized else super().rope_dims()

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        s = self.shape
        return ((s.B, s.T, s.S, s.H, s.D), (s.B, s.T, s.S, s.G, s.D))

    def traffic(self) -> int:
        """v is not touched: q and k in and out; backward also their gradients."""
        moved = sum(map(math.prod, self.output_sizes())) * self.dtype.itemsize
        return moved * (2 * ("fwd" in self.mode) + 3 * self.has_backward)

    def cuts(self) -> Cuts:
        at = {2: positions(self.shape.S)}
        tables = {1: at[2]} if self.rope_table().cos.shape[1] > 1 else {}
        names = tuple(self.sizes())
        return Cuts({**dict.fromkeys(names, at), "cos": tables, "sin": tables}, (at, at), frozenset(names))


class _PatchJob(Job):
    AXES = ("T", "rows", "heads")

    @classmethod
    def why_not(cls, workload: Workload) -> str | None:
        return None if workload.patch and workload.latent else "its patches are not in workloads.json"

    @property
    def patch(self) -> tuple[int, int, int]:
        assert self.workload.patch is not None
        return self.workload.patch

    @property
    def channels(self) -> int:
        assert self.workload.latent is not None
        return self.workload.latent[0]

    def video_size(self) -> tuple[int, ...]:
        s, (pt, ph, pw) = self.shape, self.patch
        return (s.B, self.channels, s.T * pt, s.rows * ph, s.columns * pw)

    def forward_flops(self) -> float:
        s = self.shape
        return 2.0 * s.B * s.T * s.S * s.C * self.channels * math.prod(self.patch)


class PatchifyJob(_PatchJob):
    CONSTANT = ("video",)  # latents are not trained

    def sizes(self) -> dict[str, tuple[int, ...]]:
        weight = (self.shape.C, self.channels, *self.patch)
        return {"video": self.video_size(), "weight": weight, "bias": (self.shape.C,)}

    def arguments(self, t: Tensors) -> dict[str, Any]:
        return dict(t)

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.shape.B, self.shape.T, self.shape.S, self.shape.C),)

    def backward_flops(self) -> float:
        return self.forward_flops()


class UnpatchifyJob(_PatchJob):
    def sizes(self) -> dict[str, tuple[int, ...]]:
        s, rows = self.shape, self.channels * math.prod(self.patch)
        return {"tokens": (s.B, s.T, s.S, s.C), "weight": (rows, s.C), "bias": (rows,)}

    def arguments(self, t: Tensors) -> dict[str, Any]:
        s = self.shape
        return {**t, "channels": self.channels, "patch": self.patch, "grid": (s.T, s.rows, s.columns)}

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        return (self.video_size(),)

    def backward_flops(self) -> float:
        return 2 * self.forward_flops()


class _TokenJob(Job):
    AXES = ("rows", "T", "heads")
    TOKENS: ClassVar[tuple[str, ...]]
    VECTORS: ClassVar[tuple[str, ...]]

    def sizes(self) -> dict[str, tuple[int, ...]]:
        s = self.shape
        return {**dict.fromkeys(self.TOKENS, (s.B, s.T, s.S, s.C)), **dict.fromkeys(self.VECTORS, (s.B, s.C))}

    def arguments(self, t: Tensors) -> dict[str, Any]:
        return dict(t)

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.shape.B, self.shape.T, self.shape.S, self.shape.C),)

    def cuts(self) -> Cuts:
        if self.has_backward:  # the vectors' gradients are sums over all tokens
            return super().cuts()
        at = {2: positions(self.shape.S)}
        return Cuts(dict.fromkeys(self.TOKENS, at), (at,))


class ModulateJob(_TokenJob):
    TOKENS, VECTORS = ("x",), ("shift", "scale")


class GateResidualJob(_TokenJob):
    TOKENS, VECTORS = ("residual", "x"), ("gate",)


JOBS: dict[str, type[Job]] = {
    "spatial_attention": SpatialJob,
    "temporal_attention": TemporalJob,
    "video_attention": VideoJob,
    "gated_attention": GatedJob,
    "cross_attention": CrossJob,
    "qk_norm_rope": NormRopeJob,
    "patchify": PatchifyJob,
    "unpatchify": UnpatchifyJob,
    "modulate": ModulateJob,
    "gate_residual": GateResidualJob,
}
TAKES_NORM_ROPE = ("spatial_attention", "temporal_attention", "video_attention", "gated_attention", "cross_attention")


def operators_of(backend: str) -> tuple[str, ...]:
    """All that a backend has, those without a job too."""
    return tuple(BACKENDS[backend].operators)


def operator_table() -> dict[str, dict[str, str]]:
    """Operator -> backend -> ``"fwd + bwd"``, ``"fwd"`` or ``""``: what each backend has, on any machine.

    Operators in the order of their jobs, then those without one.
    """

    def has(op: str, backend: str) -> str:
        implementation = BACKENDS[backend].operators.get(op)
        if implementation is None:
            return ""
        return "fwd" if implementation.backward is None else "fwd + bwd"

    ops = dict.fromkeys([*JOBS, *BACKENDS["reference"].operators])
    return {op: {backend: has(op, backend) for backend in BACKENDS} for op in ops}


def make(
    op: str,
    workload: Workload,
    *,
    mode: str = "fwd",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    norm_rope: bool = False,
    mask: FrameMask | None = None,
    grid_mask: GridMask | None = None,
    shape: Shape | None = None,
    batch: int = 1,
    budget: Budget | None = None,
) -> Job:
    """The job, cut to a budget; the cut is that of float32 forward, so that dtypes and modes share a shape.

    Args:
        mask: None: the model's.
        grid_mask: of video attention, in place of a mask.
        shape: None: the workload's, cut to the budget.

    Raises:
        ValueError: if the workload has no such operator.
    """
    kind = JOBS[op]
    reason = kind.why_not(workload)
    if reason is not None:
        raise ValueError(f"{workload.name} has no {op}: {reason}")
    norm_rope = op == "qk_norm_rope" or (norm_rope and op in TAKES_NORM_ROPE)
    original = workload.shape(batch)
    limit = budget or Budget.unlimited()
    mask = kind.mask_of(workload) if mask is None else mask
    masks: dict[str, Any] = {"mask": mask, "grid_mask": grid_mask}
    whole = kind(op, workload, original, shape or original, device=device, norm_rope=norm_rope, **masks)

    def fits(shape: Shape) -> bool:
        job = replace(whole, shape=shape)
        return job.forward_flops() <= limit.flops and job.traffic() <= limit.bytes

    return replace(whole, shape=shape or scaled(original, kind.AXES, fits), mode=mode, dtype=dtype)
