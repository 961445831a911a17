"""The command line: what can run here, how fast it is, and what it needs as videos get longer."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdcore.cli.demo import demo
from vdcore.cli.sample import sample
from vdcore.cli.shared import plain_errors
from vdcore.cli.train import train

if TYPE_CHECKING:
    from vdcore_bench.measure.journal import Journal, Row

# Nothing new begins after so many seconds of the default set, and of its profile. Beside busy processes on 2 cores the
# last job, plots and the report took 20 s more: the whole ends within eight minutes.
RUN_SECONDS, PROFILE_SECONDS = 440.0, 80.0

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)


def several(help: str) -> Any:
    return typer.Option(help=f"{help} Several: separate by commas, or repeat the option.", show_default=False)


# ---- Reading options; whatever is wrong with them ends with exit code 2 ----


def _split(values: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for value in values or () for name in value.split(",") if name.strip())


def _known(option: str, values: Iterable[str] | None, names: Iterable[str]) -> tuple[str, ...]:
    known, found = list(names), _split(values)
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


def _parse_frames(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    numbers = [int(n) if n.isdecimal() else 0 for n in _split([text])]
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r}: not numbers of frames such as 8,16,32", param_hint="--frames")
    return tuple(sorted(set(numbers)))


def _device(name: str | None) -> str:
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


def _threads(number: int | None) -> None:
    import torch

    if number is not None:
        torch.set_num_threads(number)


def _relaunch(device: str) -> None:
    """On the CPU goes on in a child whose allocator keeps its memory, if this one's does not; does not return then."""
    from vdcore_bench.measure import machine

    if device == "cpu" and machine.needs_relaunch():
        raise typer.Exit(machine.relaunch(sys.argv[1:]))


# ---- doctor ----


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def doctor(context: typer.Context) -> None:
    """What can run on this machine, and why the rest cannot."""
    from vdcore.cli import doctor

    raise typer.Exit(doctor.main(context.args))  # reads its options itself, since it also runs where typer is not


# ---- bench ----


@app.command()
def bench(
    op: Annotated[list[str] | None, several("Operators.")] = None,
    workload: Annotated[list[str] | None, several("Models' shapes, from workloads.json.")] = None,
    peer: Annotated[list[str] | None, several("Whom vdcore is measured against; default: everybody.")] = None,
    mode: Annotated[list[str] | None, several("fwd, bwd, fwd+bwd.")] = None,
    dtype: Annotated[list[str] | None, several("float32, bfloat16, float16.")] = None,
    norm_rope: Annotated[bool, typer.Option("--norm-rope", help="With norm and rotary embedding of q and k.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Videos in a batch.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the rounds of one job.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=3, help="Most rounds of one job.")] = 9,
    memory_limit: Annotated[str | None, typer.Option(help="What one provider may need, such as 8GiB.")] = None,
    full_size: Annotated[bool, typer.Option("--full-size", help="Do not cut workloads to this machine.")] = False,
    model: Annotated[list[str] | None, several("Models and blocks of diffusers, before and after the swap.")] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Only what frame masks cost: time per visible pair.")] = False,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Two results: files, folders, or commits with results.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Fill the tables of this file and of docs/ beside it, and do no more.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, plots and report.html.")] = Path("out/bench"),
) -> None:
    """Measures the operators against naive attention and every serious peer.

    Without arguments: every operator first, then compiled peers, masks, the cost of a call, the profile over frames,
    further dtypes, modes and workloads, until the time is over.
    """
    from dataclasses import replace

    from vdcore_bench import jobs, peers, workloads
    from vdcore_bench.jobs import base as job
    from vdcore_bench.measure import machine
    from vdcore_bench.report import console
    from vdcore_bench.suites import operators as suite
    from vdcore_bench.suites import overhead, runner
    from vdcore_bench.suites.masks import FEW_ROUNDS
    from vdcore_bench.suites.memory import SHORT
    from vdcore_bench.suites.models import block

    if compare is not None:
        _compare(*compare)
        return
    if readme is not None:
        _readme(readme)
        return
    if model:
        _bench_models(
            model, _known("--dtype", dtype, job.DTYPES) or ("float32",), rounds, threads, _device(device), out
        )
        return
    ops = _known("--op", op, [*jobs.JOBS, block.OP])
    choice = suite.Choice(
        ops=tuple(name for name in ops if name != block.OP),
        workloads=_known("--workload", workload, workloads.load()),
        modes=_known("--mode", mode, job.MODES),
        dtypes=_known("--dtype", dtype, job.DTYPES),
        norm_rope=norm_rope,
        batch=batch,
    )
    chosen_peers = frozenset(_known("--peer", peer, dict.fromkeys([*peers.names(), *block.PEERS])))
    device = _device(device)
    _threads(threads)
    limit = machine.memory_limit(device) if memory_limit is None else parse_bytes("--memory-limit", memory_limit)
    _relaunch(device)
    if masks:
        _write(out, lambda journal: _masks(journal, device, choice.dtypes or suite.BOTH))
        return

    import torch

    everything = not (ops or chosen_peers or choice != suite.Choice())
    budget = workloads.Budget.of(device, torch.get_num_threads(), machine.memory_limit(device))
    budget = workloads.Budget.unlimited() if full_size else budget
    named = () if ops == (block.OP,) else (suite.Step("Operators", tuple(suite.items(choice)), each=math.inf),)
    modes, dtypes = choice.modes or block.MODES, choice.dtypes or ("float32",)
    blocks = block.jobs(modes, dtypes, device, budget, batch) if block.OP in ops else []
    settings = runner.Settings(
        seconds=seconds,
        rounds=rounds,
        memory=limit,
        peers=chosen_peers | {"vdcore", "copy"} if chosen_peers else None,
        slow_start=not everything,
        until=time.monotonic() + RUN_SECONDS if everything else math.inf,
    )

    def run(step: suite.Step, journal: Journal) -> None:
        wanted, impossible = suite.jobs(step.items, device, budget, batch)
        journal.add(impossible)
        until = settings.until if step.compiled else math.inf  # the clock cuts off no operator
        here = replace(settings, compiled=step.compiled, each=step.each, until=until)
        with console.Screen(screen, step.title).live() as watch:
            if device == "cpu":
                watch.doing("touching memory")
                runner.touch_heap(min(runner.heap_for(wanted, limit), limit // 2))
            runner.run_jobs(wanted, here, journal, watch)

    def measure(journal: Journal) -> None:
        for step in suite.FIRST if everything else named:
            run(step, journal)
        if everything:
            _masks(journal, device, rounds=FEW_ROUNDS, until=settings.until)
            with console.Screen(screen).live() as watch:
                overhead.run(journal, device, watch.doing, settings.until)
            _profile(journal, device, time_limit=SHORT, until=min(settings.until, time.monotonic() + PROFILE_SECONDS))
            for step in suite.THEN:
                run(step, journal)
        if blocks:
            limits: dict[str, Any] = {"seconds": seconds, "rounds": rounds, "memory": limit}
            with console.Screen(screen).live() as watch:
                block.run(blocks, journal, watch, peers=chosen_peers.intersection(block.PEERS), **limits)

    def show(rows: Sequence[Row]) -> None:
        console.print_summary(screen, rows)
        if blocks:
            screen.print(console.table("A V-DiT block", block.HEADER, block.cells(rows)))

    screen = console.make_console()
    _write(out, measure, show)


def _bench_models(
    given: list[str], dtypes: tuple[str, ...], rounds: int, threads: int | None, device: str, out: Path
) -> None:
    from vdcore_bench import hosts
    from vdcore_bench.jobs import base as job
    from vdcore_bench.report import console

    if device != "cpu":
        raise typer.BadParameter(f"{device}: models of diffusers are measured on the CPU", param_hint="--device")
    _threads(threads)
    _relaunch(device)  # before diffusers is imported, which takes seconds
    _need_diffusers()
    names = _known("--model", given, [*hosts.models(), *hosts.blocks()])

    def measure(journal: Journal) -> None:
        with console.Screen(screen).live() as watch:
            for name in names:
                watch.doing(name)
                hosts.compare(name, [job.DTYPES[dtype] for dtype in dtypes], rounds, journal)

    def show(rows: Sequence[Row]) -> None:
        screen.print(console.table("Models before and after the swap", hosts.HEADER, hosts.cells(rows)))

    screen = console.make_console()
    _write(out, measure, show)


def _need_diffusers() -> None:
    import logging

    from vdcore.extras import need

    with plain_errors():
        need("diffusers", "models", "--model")
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def _masks(journal: Journal, device: str, dtypes: Iterable[str] = ("float32",), **settings: Any) -> None:
    from vdcore_bench.jobs import base as job
    from vdcore_bench.report import console
    from vdcore_bench.suites import masks

    screen = console.make_console()
    with console.Screen(screen).live() as watch:
        masks.run(journal, device, [job.DTYPES[name] for name in dtypes], watch.doing, **settings)
    console.print_masks(screen, journal.rows)


def _compare(a: str, b: str) -> None:
    from vdcore_bench.measure import journal as results
    from vdcore_bench.report import compare, console

    try:
        rows = [results.load(source) for source in (a, b)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from None
    console.print_comparison(console.make_console(), compare.compare(*rows))


def _readme(path: Path) -> None:
    from vdcore_bench.report import readme

    try:
        readme.write(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--readme") from None


# ---- profile ----


@app.command()
def profile(
    workload: Annotated[list[str] | None, several("Models' shapes, from workloads.json.")] = None,
    model: Annotated[list[str] | None, several("Instead: VDiT variants, or blocks of diffusers.")] = None,
    frames: Annotated[str | None, typer.Option(help="Numbers of frames, such as 8,16,32.")] = None,
    attention: Annotated[list[str] | None, several("naive, sdpa, vdcore.")] = None,
    mode: Annotated[str, typer.Option(help="fwd, bwd or fwd+bwd.")] = "fwd",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="Such as 8GiB; default: what is available.")] = None,
    time_limit: Annotated[float, typer.Option(min=0, help="Seconds of one call; what takes longer is predicted.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, plots and report.html.")] = Path("out/profile"),
) -> None:
    """Peak memory and time against frames; a point that would not fit is predicted, and says what it would need."""
    from vdcore_bench import workloads
    from vdcore_bench.jobs import base as job
    from vdcore_bench.measure import memory
    from vdcore_bench.suites import memory as profile

    names = _known("--workload", workload, workloads.load())
    device = _device(device)
    (mode,) = _known("--mode", [mode], job.MODES)
    (dtype,) = _known("--dtype", [dtype], job.DTYPES)
    settings: dict[str, Any] = {
        "frames": _parse_frames(frames) or profile.FRAMES,
        "attentions": _known("--attention", attention, memory.ATTENTIONS) or memory.ATTENTIONS,
        "mode": mode,
        "dtype": job.DTYPES[dtype],
        "time_limit": time_limit,
    }
    if memory_limit is not None:
        settings["memory_limit"] = parse_bytes("--memory-limit", memory_limit)
    if model:
        _profile_models(model, device, threads, out, **settings)
        return
    _threads(threads)
    _relaunch(device)
    _write(out, lambda journal: _profile(journal, device, names, **settings))


def _profile_models(given: list[str], device: str, threads: int | None, out: Path, **settings: Any) -> None:
    from vdcore_bench import hosts
    from vdcore_bench.report import console
    from vdcore_bench.suites import memory as profile
    from vdcore_bench.suites.models import vdit

    _threads(threads)
    _relaunch(device)  # before diffusers is imported, which takes seconds
    wanted = set(_split(given)) - set(vdit.VARIANTS)
    if wanted:
        _need_diffusers()
    names = _known("--model", given, [*vdit.VARIANTS, *(hosts.blocks() if wanted else ())])
    if wanted and (device != "cpu" or settings["mode"] != "fwd"):
        raise typer.BadParameter("blocks of diffusers are profiled forward on the CPU", param_hint="--model")
    limits = profile.Settings(device=device, **settings)

    def measure(journal: Journal) -> None:
        with console.Screen(screen).live() as watch:
            for name in names:
                if name in vdit.VARIANTS:
                    vdit.run((name,), limits, journal, watch.show)
                else:
                    hosts.profile(name, limits, journal, watch.show)
        console.print_profile(screen, journal.rows)

    screen = console.make_console()
    _write(out, measure)


def _profile(journal: Journal, device: str, names: tuple[str, ...] = (), **settings: Any) -> None:
    from vdcore_bench.measure import machine
    from vdcore_bench.report import console
    from vdcore_bench.suites import memory as profile

    settings.setdefault("memory_limit", machine.memory_limit(device))
    screen = console.make_console()
    watch = console.ProfileScreen(screen, journal.rows)
    with watch.live():
        profile.run(
            names or (profile.WORKLOAD,), profile.Settings(device=device, **settings), journal, watch.at, watch.done
        )
    console.print_profile(screen, journal.rows)


def _write(
    out: Path, measure: Callable[[Journal], None], show: Callable[[Sequence[Row]], None] = lambda rows: None
) -> None:
    """Runs a measurement into a folder; an interrupt loses nothing that was measured. Ends with plots and report."""
    from vdcore_bench.measure import machine
    from vdcore_bench.measure.journal import FILE, Journal
    from vdcore_bench.report import results as report
    from vdcore_bench.report import summary

    journal, load, interrupted = Journal(out / FILE), machine.Load(), False
    try:
        measure(journal)
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted: {len(journal.rows)} rows are in {out / FILE}", file=sys.stderr)
    finally:
        journal.close()
    noise = summary.noise(journal.rows, load)
    print(f"\n{noise}")
    show(journal.rows)
    written = report.write(journal.rows, out, noise)
    print(f"{len(journal.rows)} rows in {out / FILE}; {', '.join(path.name for path in written)} beside it")
    if interrupted:
        raise typer.Exit(130)


# ---- train, sample, demo ----

app.command()(train)
app.command()(sample)
app.command()(demo)
