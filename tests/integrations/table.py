"""The table of every video model of diffusers before and after the swap: ``python tests/integrations/table.py``.

Tiny models with random weights, at least three frames, rows and columns of different numbers; and with ``--blocks``
blocks of real width, with a breakdown of their time.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections import Counter
from collections.abc import Callable

import diffusers
import torch
from inside import AttentionCalls
from torch import Tensor, nn
from zoo import MODELS, output

from vdcore.testing import error_ratio
from vdcore_bench.measure.machine import heap, touch_heap
from vdcore_bench.measure.memory import peak_of
from vdcore_bench.measure.parts import breakdown
from vdcore_bench.measure.timing import race_calls
from vdcore_bench.suites.models.host_blocks import BLOCKS
from vdcore_bench.suites.models.hosts import Host, HostPoint, exact

MIB = 2**20


class TinyPoint(HostPoint):
    """A tiny model in place of a block."""

    def build(self, wide: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
        tiny, dtype = MODELS[self.name], torch.float64 if wide else self.dtype
        model, given = tiny.model(dtype), tiny.arguments(dtype)
        return model, lambda: output(model(**given))


def model_row(name: str, rounds: int) -> dict[str, str]:
    """One row: calls, errors, time and memory of a model."""
    row = {"model": name}
    for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        host, ours = (TinyPoint(name, provider, dtype=dtype).make() for provider in ("diffusers", "vdcore"))
        before, after = host.call, ours.call
        if dtype == torch.float32:
            row |= _calls(host, ours)
            times = race_calls({"host": before, "vdcore": after}, rounds)
            row["ms"] = f"{1e3 * times['host'].p50:.1f} / {1e3 * times['vdcore'].p50:.1f}"
            row["peak MiB"] = f"{peak_of(before).bytes / MIB:.1f} / {peak_of(after).bytes / MIB:.1f}"
        ratio = error_ratio(after(), exact(TinyPoint(name, dtype=dtype)), [before()])
        row[f"error {label}"] = f"{ratio.worst:.2f}"
    return row


def calls_row(name: str) -> dict[str, str]:
    """What of a row no machine changes: calls of attention, who serves them, what is left."""
    return _calls(*(TinyPoint(name, provider).make() for provider in ("diffusers", "vdcore")))


def _calls(host: Host, ours: Host) -> dict[str, str]:
    with AttentionCalls() as before:
        host.call()
    with AttentionCalls() as after:
        ours.call()
    assert ours.report is not None
    reasons = Counter(f"{entry.kind}: {entry.what}" for entry in ours.report.left)
    served = ", ".join(f"{n} {op.removesuffix('_attention')}" for op, n in sorted(after.operators().items()))
    return {
        "calls": str(before.torch.total()),
        "served": f"{after.served} ({served})",
        "left to torch": str(after.torch.total()),
        "why": "; ".join(f"{n} x {reason}" for reason, n in reasons.items()),
    }


def block_row(name: str, dtype: torch.dtype, rounds: int, small: bool) -> tuple[dict[str, str], list[str]]:
    """One row of a block of real width, and the lines of its breakdown."""
    size = BLOCKS[name].small if small else BLOCKS[name].size
    points = [HostPoint(name, provider, size[0], dtype, size[1:]) for provider in ("diffusers", "vdcore")]
    before, after = (point.make().call for point in points)
    ratio = error_ratio(after(), exact(points[0]), [before()])
    times = race_calls({"host": before, "vdcore": after}, rounds)
    parts = {"host": breakdown(before, rounds=rounds), "vdcore": breakdown(after, rounds=rounds)}
    around = {key: part.around for key, part in parts.items()}
    row = {
        "block": name,
        "T x H x W": " x ".join(map(str, size)),
        "dtype": str(dtype).removeprefix("torch."),
        "error": f"{ratio.worst:.2f}",
        "ms": f"{1e3 * times['host'].p50:.0f} / {1e3 * times['vdcore'].p50:.0f}",
        "around the products, ms": f"{around['host']:.0f} / {around['vdcore']:.0f}",
        "peak MiB": f"{peak_of(before).bytes / MIB:.0f} / {peak_of(after).bytes / MIB:.0f}",
    }
    return row, [f"- {name}, {key}: {part} ms" for key, part in parts.items()]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 2 if a name is unknown."""
    parser = argparse.ArgumentParser(prog="python tests/integrations/table.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="models, or blocks with --blocks; none: all")
    parser.add_argument("--blocks", action="store_true", help="blocks of real width instead of tiny models")
    parser.add_argument("--small", action="store_true", help="blocks at a size for small machines")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of blocks")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    known = BLOCKS if given.blocks else MODELS
    unknown = [name for name in given.names if name not in known]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)
    if given.blocks:
        touch_heap(2**31)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {heap()}"
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, {machine}.")
    print("Pairs are host / vdcore. Errors are over what the tolerance rule allows: fine up to 1.")
    notes: list[str] = []
    for i, name in enumerate(given.names or known):
        if given.blocks:
            row, lines = block_row(name, getattr(torch, given.dtype), given.rounds, given.small)
            notes += lines
        else:
            row = model_row(name, given.rounds)
        if i == 0:
            print("\n| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
        print("| " + " | ".join(row.values()) + " |", flush=True)
    if notes:
        print("\n" + "\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
