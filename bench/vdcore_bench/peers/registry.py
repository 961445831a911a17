"""What a baseline is, and how one joins: :func:`peer`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vdcore_bench.jobs import JOBS
from vdcore_bench.jobs.base import Job
from vdcore_bench.own import own_function
from vdcore_bench.peers.adapter import Makers

ATTENTION = ("spatial_attention", "temporal_attention", "video_attention", "gated_attention", "cross_attention")


@dataclass(frozen=True)
class Peer:
    """One library, or one way of writing an operator in PyTorch.

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


PEERS: list[Peer] = []


def peer(name: str, ops: tuple[str, ...], **options: Any) -> Callable[[Callable[[Job], Makers]], Any]:
    """Decorator: a function from a job to its variants becomes a baseline; options as :class:`Peer` has them."""

    def register(variants: Callable[[Job], Makers]) -> Callable[[Job], Makers]:
        PEERS.append(Peer(name, ops, variants, **options))
        return variants

    return register


def names() -> list[str]:
    """What ``--peer`` takes: vdcore, the memcpy baseline `copy`, and every peer, also without its ``[backend]``."""
    families = [name for peer in PEERS for name in (peer.name.partition("[")[0], peer.name)]
    return list(dict.fromkeys(["vdcore", "copy", *families]))


def library(module: str, *, needs_half: bool = True, backward: bool = True) -> Callable[[Job], str | None]:
    """Why a library of NVIDIA kernels cannot run a job here."""

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


# ---- Baselines of the user's own ----


def from_user(spec: str) -> Peer:
    """``"module:function"`` as a baseline of every operator; the module may lie in the working directory.

    The function gets the :class:`~vdcore_bench.jobs.base.Job` (its ``op``, ``shape``, ``mask``, ``mode``, ``dtype``,
    ``device``) and returns a function with the public operator's keyword arguments and result, several of them by name,
    or a string: why it does not run this job.

    Raises:
        ValueError: if there is no such module, if importing it fails, or if it has no such function.
    """
    found = own_function(spec)
    answers: list[tuple[Job, Any]] = []  # the last job's: it is asked once per job

    def answer(job: Job) -> Any:
        """What the function returned, or the exception that it raised."""
        if not answers or answers[0][0] is not job:
            try:
                answers[:] = [(job, found(job))]
            except Exception as error:
                answers[:] = [(job, error)]
        return answers[0][1]

    def variants(job: Job) -> Makers:
        made = answer(job)
        if isinstance(made, Exception):
            raise made
        functions = made if isinstance(made, dict) else {"": made}
        named = all(isinstance(name, str) and callable(f) for name, f in functions.items())
        if not functions or not named:
            raise TypeError(f"{spec} must return a function, a dict of functions by name or a reason, got {made!r}")
        return {name: lambda f=f: f for name, f in functions.items()}  # type: ignore[misc]

    def why_not(job: Job) -> str | None:
        made = answer(job)
        return (made or f"{spec} returned no reason") if isinstance(made, str) else None

    return Peer(spec, tuple(JOBS), variants, why_not, module=spec.partition(":")[0])
