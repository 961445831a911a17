"""Options that several commands share; whatever is wrong with one ends with exit code 2."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdcore import extras

if TYPE_CHECKING:
    from vdcore_bench.measure.journal import Journal, Watch


def several(help: str) -> Any:
    return typer.Option(help=f"{help} Several: separate by commas, or repeat the option.", show_default=False)


WORKLOAD = Annotated[list[str] | None, several("Models' shapes, from workloads.json.")]
DEVICE = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
THREADS = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")]


def split(values: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for value in values or () for name in value.split(",") if name.strip())


def known(option: str, values: Iterable[str] | None, names: Iterable[str]) -> tuple[str, ...]:
    """The names that are given, each of them known."""
    known, found = list(names), split(values)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: not known; known are {', '.join(known)}", param_hint=option)
    return found


def parse_bytes(option: str, text: str) -> int:
    """``"8GiB"``, ``"512 MiB"``, ``"2e9"``; GB are powers of ten."""
    units = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6}
    units |= {"GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    try:
        assert match is not None
        size = int(float(match[1]) * units[match[2].upper()])
    except (AssertionError, KeyError, ValueError):
        raise typer.BadParameter(f"{text!r}: not a size such as 8GiB", param_hint=option) from None
    if size <= 0:
        raise typer.BadParameter(f"{text!r}: not positive", param_hint=option)
    return size


def device_named(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name}: not known; known are cpu, cuda, cuda:0, ...", param_hint="--device")
    return name


def set_threads(number: int | None) -> None:
    """torch's threads; None: as they are."""
    import torch

    if number is not None:
        torch.set_num_threads(number)


def prepare(device: str, threads: int | None) -> None:
    """Sets the threads. On the CPU goes on in a child whose allocator keeps its memory, if this one's does not."""
    from vdcore_bench.measure import machine

    set_threads(threads)
    if device == "cpu" and machine.needs_relaunch():
        raise typer.Exit(machine.relaunch(sys.argv[1:]))


def models_named(given: list[str] | None, device: str, blocks_alone: bool = False) -> tuple[str, ...]:
    """The names of ``--model``; diffusers, which takes seconds, is imported for its own models alone.

    Args:
        blocks_alone: of diffusers only blocks are known, no whole models.
    """
    from vdcore_bench.suites import models
    from vdcore_bench.suites.models import hosts, steps

    own = models.PROFILED if blocks_alone else models.OWN
    if not set(split(given)) - set(own):
        return known("--model", given, own)
    if device != "cpu":
        raise typer.BadParameter(f"{device}: models of diffusers are measured on the CPU", param_hint="--device")
    try:
        extras.need("diffusers", "models", "--model")
    except ImportError as error:
        print(f"vdcore: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    whole = [] if blocks_alone else [*hosts.models(), *steps.names()]
    return known("--model", given, [*own, *whole, *hosts.blocks()])


def record(out: Path, measure: Callable[[Journal, Watch], None]) -> None:
    """Runs a measurement into a folder; an interrupt loses nothing that was measured. Ends with plots and report."""
    from vdcore_bench.measure import machine
    from vdcore_bench.measure.journal import FILE, Journal
    from vdcore_bench.report import console, results, summary, terminal

    try:
        journal = Journal(out / FILE)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    load, interrupted = machine.Load(), False
    screen = terminal.make_console()
    try:
        measure(journal, console.Screen(screen))
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted: {len(journal.rows)} rows are in {out / FILE}", file=sys.stderr)
    finally:
        journal.close()
    noise = summary.noise(journal.rows, load)
    print(f"\n{noise}")
    console.print_summary(screen, journal.rows)
    written = results.write(journal.rows, out, noise)
    print(f"{len(journal.rows)} rows in {out / FILE}; {', '.join(path.name for path in written)} beside it")
    if interrupted:
        raise typer.Exit(130)
