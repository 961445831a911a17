"""How wrong gradients are as sequences grow: attention's, in half precision, against float64's of the same inputs.

A gradient that is added up in its own dtype loses a digit for every so many tokens; one that is added up in float32
does not. The error is the RMS of the difference over the RMS of the gradient, the worst of q, k and v.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vdcore
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import DTYPE_NAMES, DTYPES, Job
from vdcore_bench.measure.journal import Journal, Row, Watch
from vdcore_bench.suites import Options, no_gpu
from vdcore_bench.suites.runner import LATE, blank
from vdcore_bench.workloads import Shape, load

TAKES = frozenset({"dtypes", "until"})
why_not = no_gpu
METRIC = "gradient_error"
WORKLOAD = "latte-1-512"
TOKENS = (256, 1024, 4096, 16384)
HEADS, CHANNELS = 2, 64
HEADER = ("tokens", "dtype", "vdcore", "torch's attention")
_ROWS = 512  # of queries, whose scores are in memory at once


def job_of(tokens: int, dtype: torch.dtype, device: str = "cpu") -> Job:
    shape = Shape(B=1, T=1, rows=1, columns=tokens, H=HEADS, G=HEADS, D=CHANNELS)
    return make("spatial_attention", load()[WORKLOAD], mode="fwd+bwd", dtype=dtype, device=device, shape=shape)


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Gradients of attention in float64, some queries at a time; all ``(H, N, D)``."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, q.shape[1], _ROWS):
        some, grad = q[:, i : i + _ROWS], dout[:, i : i + _ROWS]
        p = (some @ k.mT * scale).softmax(-1)
        dv += p.mT @ grad
        dp = grad @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq[:, i : i + _ROWS] = ds @ k * scale
        dk += ds.mT @ some * scale
    return [dq, dk, dv]


def ways(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A provider's name and its attention of ``(H, N, D)``."""
    tokens = [x.transpose(0, 1)[None, None] for x in (q, k, v)]  # (1, 1, N, H, D)
    backend = vdcore.explain("spatial_attention", *tokens)[0][0]
    yield f"vdcore[{backend}]", lambda: vdcore.spatial_attention(*tokens)[0, 0].transpose(0, 1)
    yield "sdpa", lambda: F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def measure(job: Job) -> Iterator[Row]:
    """A row for each provider: the error at the job's number of tokens."""
    tokens, dtype = job.shape.S, job.dtype
    generator = torch.Generator(job.device).manual_seed(tokens)
    drawn = [torch.randn(HEADS, tokens, CHANNELS, generator=generator, device=job.device) for _ in range(4)]
    q, k, v, dout = (x.to(dtype) for x in drawn)
    reference = exact(q, k, v, dout)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for provider, attend in ways(q, k, v):
        found = torch.autograd.grad(attend(), leaves, dout)
        errors = [_rms(dx.double() - exact_dx) / _rms(exact_dx) for dx, exact_dx in zip(found, reference)]
        yield replace(
            blank(job), metric=METRIC, unit="relative", provider=provider, x=float(tokens), p50=max(errors), samples=1
        )


def _rms(x: Tensor) -> float:
    return math.sqrt(x.square().mean().item())


def run(options: Options, journal: Journal, watch: Watch) -> None:
    points = [(DTYPES[name], tokens) for name in options.dtypes or ("bfloat16", "float16") for tokens in TOKENS]
    with watch.part("Error of gradients against tokens"):
        for number, (dtype, tokens) in enumerate(points):
            job, begin = job_of(tokens, dtype, options.device), len(journal.rows)
            watch.step(f"gradients of {tokens} tokens, {DTYPE_NAMES[dtype]}", number, len(points))
            if time.monotonic() > options.until:
                late: dict[str, Any] = {"metric": METRIC, "provider": "all", "status": "skipped", "reason": LATE}
                journal.add([replace(blank(job), x=float(tokens), **late)])
            else:
                journal.add(measure(job))
            watch.done(journal.rows[begin:])


def cells(rows: Iterable[Row]) -> Sequence[tuple[str, ...]]:
    """Table rows as :data:`HEADER` names them."""
    found: dict[tuple[str, float], dict[str, str]] = {}
    for row in rows:
        if row.metric == METRIC and row.p50 and row.x:
            ours = row.provider.startswith("vdcore")
            found.setdefault((row.dtype, row.x), {})["vdcore" if ours else "torch"] = f"{row.p50:.2e}"
    return [
        (f"{tokens:,.0f}", dtype, errors.get("vdcore", "-"), errors.get("torch", "-"))
        for (dtype, tokens), errors in sorted(found.items())
    ]
