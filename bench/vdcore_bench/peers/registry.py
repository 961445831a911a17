"""What a baseline is, and how one joins: :func:`peer`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vdcore_bench.jobs import JOBS
from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Function, Makers

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
        ValueError: if there is no such module, or no such function in it.
    """
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{spec}: expected module:function, and importing {module!r} failed: {error}") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise ValueError(f"{spec}: expected module:function, and {module} has no function {name!r}")

    def given(job: Job) -> dict[str, Function]:
        made = found(job)
        if callable(made):
            return {"": made}
        if isinstance(made, dict) and made and all(map(callable, made.values())):
            return made
        raise TypeError(f"{spec} must return a function, a dict of functions or a reason, got {made!r}")

    def variants(job: Job) -> Makers:
        return {variant: lambda f=f: f for variant, f in given(job).items()}  # type: ignore[misc]

    def why_not(job: Job) -> str | None:
        made = found(job)
        return made if isinstance(made, str) else None

    return Peer(spec, tuple(JOBS), variants, why_not, module=module)
