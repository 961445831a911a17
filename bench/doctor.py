"""What can run here and why not, as plain data for ``vdcore doctor``. Imports neither triton nor any peer."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from vdcore.bench import machine
from vdcore.bench.jobs import JOBS
from vdcore.bench.peers import PEERS

import vdcore
from vdcore.backends import BACKENDS
from vdcore.testing import cases_of

ALLOCATOR_ADVICE = (
    "glibc gives every tensor over 32 MB fresh pages, and page faults then take longer than a memory-bound kernel: "
    f"start Python with {machine.ADVICE}, or preload tcmalloc or jemalloc"
)


def operator_table() -> dict[str, dict[str, str]]:
    """Operator -> backend -> ``"fwd + bwd"``, ``"fwd"`` or ``""``: what each backend has, on any machine."""

    def has(op: str, backend: str) -> str:
        implementation = BACKENDS[backend].operators.get(op)
        if implementation is None:
            return ""
        return "fwd" if implementation.backward is None else "fwd + bwd"

    return {op: {backend: has(op, backend) for backend in BACKENDS} for op in JOBS}


def chosen() -> dict[str, dict[str, str]]:
    """Operator -> device -> the backend that `auto` takes for a plain float32 call with gradients."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: dict[str, dict[str, str]] = {}
    for op in JOBS:
        case = next(case for case in cases_of(op) if "plain" in case.tags)
        for device in devices:
            inputs = case.inputs(torch.float32, requires_grad=True, device=device)
            found.setdefault(op, {})[device] = vdcore.explain(op, **inputs.args)[0][0]
    return found


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": p.name,
                "capability": f"sm_{p.major}{p.minor}",
                "memory": p.total_memory,
                "multiprocessors": p.multi_processor_count,
            }
        )
    return found


def peers() -> dict[str, str | None]:
    """Libraries to be measured against -> version, or None where not installed."""
    modules = sorted({peer.module for peer in PEERS})
    return {
        module: (machine.version_of(module) or machine.version_of(module.replace("_", "-")) or "installed")
        if importlib.util.find_spec(module) is not None
        else None
        for module in modules
    }


def facts() -> dict[str, Any]:
    """Everything that ``vdcore doctor`` prints; sizes in bytes."""
    import psutil

    return {
        "versions": machine.versions(),
        "commit": machine.commit(),
        "threads": {"torch": torch.get_num_threads(), "cores": psutil.cpu_count(logical=False) or psutil.cpu_count()},
        "memory": {"available": machine.available_memory(), "total": psutil.virtual_memory().total},
        "gpus": gpus(),
        "allocator": {
            "name": machine.allocator(),
            "advice": ALLOCATOR_ADVICE if machine.needs_relaunch() else None,
        },
        "backends": vdcore.backends(),
        "operators": operator_table(),
        "chosen": chosen(),
        "peers": peers(),
    }
