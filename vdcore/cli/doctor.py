"""``vdcore doctor``: what can run here and why not. It needs torch and numpy alone, and imports no peer."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import vdcore
from vdcore import extras
from vdcore.testing import cases_of
from vdcore_bench.jobs import operator_table, operators_of
from vdcore_bench.measure import machine
from vdcore_bench.measure.products import products
from vdcore_bench.peers import PEERS
from vdcore_bench.report.table import Table

EXTRAS = {
    "bench": "the other commands of vdcore",
    "models": "models of diffusers, checkpoints: swap_in, train, sample, demo",
    "video": "video files, contact sheets, optical flow: train, sample, demo",
}
ALLOCATOR_ADVICE = (
    "glibc gives every tensor over 32 MB fresh pages, and page faults then take longer than a memory-bound kernel: "
    f"start Python with {machine.ADVICE}, or preload tcmalloc or jemalloc"
)
# Names that LLVM knows, from gfx900 on.
AMD = re.compile(r"gfx(90[024689ac]|942|950|101[0-3]|103[0-6]|110[0-3]|115[0-3]|120[01]|125[01])")


def chosen() -> dict[str, dict[str, str]]:
    """Operator -> device -> the backend that `auto` takes for a plain float32 call with gradients."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: dict[str, dict[str, str]] = {}
    for op in operator_table():
        case = next(case for case in cases_of(op) if "plain" in case.tags)
        for device in devices:
            inputs = case.inputs(torch.float32, requires_grad=True, device=device)
            found.setdefault(op, {})[device] = vdcore.explain(op, **inputs.args)[0][0]
    return found


def dtype_advice(rates: dict[str, float]) -> str:
    """In which dtype to run models on this CPU, from :func:`products`.

    bfloat16 where it is no slower than float32, because it takes half the memory. float16 only where it is clearly
    ahead of both: most video models are trained in bfloat16, and may leave float16's range, which ends at 65,504.
    """
    single, brain, half = (rates[name] for name in ("float32", "bfloat16", "float16"))
    name = "bfloat16" if brain >= 0.9 * single else "float32"
    if half > 1.25 * rates[name]:
        name = "float16"
    others = ", ".join(
        f"{other} runs at {rate / rates[name]:.2g} of that" for other, rate in rates.items() if other != name
    )
    return f"Run models on this CPU in {name}: torch's product of 1,024 runs at {rates[name]:.0f} GFLOP/s, {others}."


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
        if extras.installed(module)
        else None
        for module in modules
    }


def cores() -> int | None:
    """Physical cores; logical ones where psutil is missing or cannot tell."""
    if extras.installed("psutil"):
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count()
    return os.cpu_count()


def memory() -> dict[str, int | None]:
    """Bytes of main memory; None where psutil is missing."""
    if not extras.installed("psutil"):
        return {"available": None, "total": None}
    import psutil

    return {"available": machine.available_memory(), "total": psutil.virtual_memory().total}


def facts() -> dict[str, Any]:
    """Everything that ``vdcore doctor`` prints; sizes in bytes, extras with what is missing of them."""
    return {
        "versions": machine.versions(),
        "commit": machine.commit(),
        "threads": {"torch": torch.get_num_threads(), "cores": cores()},
        "memory": memory(),
        "gpus": gpus(),
        "allocator": {"name": machine.allocator(), "advice": ALLOCATOR_ADVICE if machine.needs_relaunch() else None},
        "extras": {extra: extras.missing(extra) for extra in extras.EXTRAS},
        "products": products(),
        "backends": vdcore.backends(),
        "operators": operator_table(),
        "chosen": chosen(),
        "peers": peers(),
    }


# ---- The same as text ----


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return Table.of(header, rows, title).plain()


def text(facts: dict[str, Any]) -> str:
    """:func:`facts` for people."""
    advice = facts["allocator"]["advice"]
    return "\n".join(
        [
            _table("Machine", ("what", "is"), _machine(facts)),
            *([f"Advice: {advice}\n"] if advice else []),
            f"{dtype_advice(facts['products'])}\n",
            _table("Extras", ("extra", "for", "here"), _extras(facts)),
            _table("Backends", ("backend", "here"), ((n, why or "usable") for n, why in facts["backends"].items())),
            _table("Operators", *_operators(facts)),
            _table("Peers", ("library", "version"), ((n, v or "not installed") for n, v in facts["peers"].items())),
        ]
    )


def _machine(facts: dict[str, Any]) -> list[tuple[str, str]]:
    versions, available = facts["versions"], facts["memory"]["available"]
    return [
        *((name, value) for name, value in versions.items() if value),
        ("commit", facts["commit"] or "not a checkout"),
        ("threads", f"{facts['threads']['torch']} of torch on {facts['threads']['cores']} cores"),
        ("memory", "unknown without psutil" if available is None else f"{machine.bytes_text(available)} available"),
        ("allocator", facts["allocator"]["name"]),
        *((f"GPU {i}", _gpu(gpu)) for i, gpu in enumerate(facts["gpus"])),
        *((name, "none") for name, value in versions.items() if not value),
    ]


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['capability']}, {machine.bytes_text(gpu['memory'])}"


def _extras(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (extra, EXTRAS[extra], f"{', '.join(missing)} missing: {extras.install(extra)}" if missing else "installed")
        for extra, missing in facts["extras"].items()
    ]


def _operators(facts: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what each backend has of an operator, and which of them `auto` takes."""
    names, devices = list(facts["backends"]), list(next(iter(facts["chosen"].values())))
    header = ("operator", *names, *(f"auto on {device}" for device in devices))
    rows = [
        (op, *(has[name] or "-" for name in names), *(facts["chosen"][op][device] for device in devices))
        for op, has in facts["operators"].items()
    ]
    return header, rows


# ---- The command ----


def main(arguments: Sequence[str]) -> int:
    """``vdcore doctor`` with these arguments; returns the exit code."""
    parser = argparse.ArgumentParser(
        "vdcore doctor", description="What can run on this machine, and why the rest cannot."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--compile", action="store_true", help="compile every Triton kernel ahead of time; needs no GPU"
    )
    parser.add_argument("--arch", action="append", default=[], help="of --compile, such as sm_90 or sm_80,gfx942")
    parser.add_argument("--op", action="append", default=[], help="of --compile: kernels of these operators alone")
    given = parser.parse_args(arguments)
    for name, values in (("--arch", given.arch), ("--op", given.op)):
        if values and not given.compile:
            parser.error(f"{name} is of --compile, got {name} {values[0]} without it")
    if not given.compile:
        found = facts()
        print(json.dumps(found, indent=1) if given.json else text(found))
        return 0
    try:
        ops = [op for value in given.op for op in _ops(value)]
    except ValueError as error:
        parser.error(f"--op: {error}")
    try:
        archs = [arch for value in given.arch for arch in _archs(value)]
        records = _machine_code(archs, ops) if given.json else _compiled(archs, ops)
    except ValueError as error:
        parser.error(f"--arch: {error}")
    except (ModuleNotFoundError, OSError, RuntimeError) as error:
        print(f"vdcore: kernels cannot be compiled ahead of time here: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vdcore: stopped; what has been compiled is in Triton's cache", file=sys.stderr)
        return 130
    if given.json:
        print("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")  # a row a line
        return 1 if any(record["bound_by"].startswith("it fails") for record in records) else 0
    print(_records(records))
    return 1 if any(record["problem"] for record in records) else 0


def _archs(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise ValueError(f"expected architectures such as sm_90 or sm_80,gfx942, got {value!r}")
    for name in names:
        if name.startswith("gfx") and not AMD.fullmatch(name):
            raise ValueError(f"expected an AMD GPU that LLVM knows, such as gfx942, got {name!r}")
    return names


def _ops(value: str) -> list[str]:
    names, there = [name.strip() for name in value.split(",") if name.strip()], operators_of("triton")
    if not names or not set(there) >= set(names):
        raise ValueError(f"expected operators of {', '.join(there)}, got {value!r}")
    return names


def _compiled(archs: Sequence[str], ops: Sequence[str]) -> list[dict[str, Any]]:
    """A record for every kernel, config and architecture; of these operators, where any are named."""
    aot = importlib.import_module("vdcore_bench.aot")  # needs triton
    return [dataclasses.asdict(record) for record in aot.compile_report(tuple(archs) or None, ops=ops)]


def _machine_code(archs: Sequence[str], ops: Sequence[str]) -> list[dict[str, Any]]:
    """What the machine code of the benchmarks' kernels says, or of these operators'."""
    machine_code = importlib.import_module("vdcore_bench.machine_code")
    found: list[dict[str, Any]] = machine_code.report(tuple(archs) or None, ops=ops)
    return found


def _records(records: Sequence[dict[str, Any]]) -> str:
    header = tuple(records[0]) if records else ("nothing",)
    rows = (["-" if value is None else str(value) for value in record.values()] for record in records)
    return _table("Kernels compiled ahead of time", header, rows)
