"""``vdcore bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vdcore.cli import options
from vdcore.cli.options import several

if TYPE_CHECKING:
    from vdcore_bench.peers import Peer
    from vdcore_bench.suites import Options

# Field of the options -> how the command line calls it.
NAMES = {"ops": "op", "workloads": "workload", "peers": "peer", "own": "peer", "modes": "mode", "dtypes": "dtype"}
NAMES |= {"models": "model", "parts": "only"}


def bench(
    suite: Annotated[
        str | None,
        typer.Argument(
            metavar="SUITE",
            help="operators, masks, memory, models, overhead, tangents, gradients or gpu.",
            show_default=False,
        ),
    ] = None,
    op: Annotated[list[str] | None, several("Operators.")] = None,
    workload: options.WORKLOAD = None,
    peer: Annotated[
        list[str] | None, several("Which baselines to run; default: all. module:function: one of your own beside them.")
    ] = None,
    mode: Annotated[list[str] | None, several("fwd, bwd, fwd+bwd.")] = None,
    dtype: Annotated[list[str] | None, several("float32, bfloat16, float16.")] = None,
    norm_rope: Annotated[bool, typer.Option("--norm-rope", help="With norm and rotary embedding of q and k.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Videos in a batch.")] = 1,
    device: options.DEVICE = None,
    threads: options.THREADS = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the rounds of one job.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=3, help="Most rounds of one job.")] = 9,
    memory_limit: Annotated[str | None, typer.Option(help="What one provider may need, such as 8GiB.")] = None,
    full_size: Annotated[bool, typer.Option("--full-size", help="Do not cut workloads to this machine.")] = False,
    model: Annotated[list[str] | None, several("Of the suite models: VDiTs, blocks and steps of diffusers.")] = None,
    only: Annotated[list[str] | None, several("Parts of the suite gpu.")] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Two results: files, folders, or commits with results.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Fill the tables of this file and of docs/ beside it, and do no more.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl, plots and report.html; default: out/bench.")
    ] = None,
) -> None:
    """Measures one suite; if none is named, every operator against its baselines.

    Without arguments: every operator first, then compiled peers, masks, the cost of a call, the profile over frames,
    further dtypes, modes and workloads, until the time is over.
    """
    if compare is not None:
        return _compare(*compare)
    if readme is not None:
        return _readme(readme)

    from vdcore_bench import jobs, suites, workloads
    from vdcore_bench.jobs.base import DTYPES, MODES
    from vdcore_bench.suites import everything, models
    from vdcore_bench.suites.gpu import PARTS

    if suite is not None:
        options.known("SUITE", [suite], suites.SUITES)
    device = options.device_named(device)
    baselines, own = _peers(peer)
    given = suites.Options(
        ops=options.known("--op", op, [*jobs.JOBS, models.block.OP]),
        workloads=options.known("--workload", workload, workloads.load()),
        peers=baselines,
        own=own,
        modes=options.known("--mode", mode, MODES),
        dtypes=options.known("--dtype", dtype, DTYPES),
        models=options.models_named(model, device),
        parts=options.known("--only", only, PARTS),
        norm_rope=norm_rope,
        batch=batch,
        seconds=seconds,
        rounds=rounds,
        memory_limit=None if memory_limit is None else options.parse_bytes("--memory-limit", memory_limit),
        full_size=full_size,
        device=device,
    )
    name = _suite(suite, given)
    options.prepare(device, threads)
    run = suites.find(name).run if suite or given.choose else everything.run
    folder = Path("out/gpu" if name == "gpu" else "out/bench")
    options.record(out or folder, lambda journal, watch: run(given, journal, watch))


def _suite(name: str | None, given: Options) -> str:
    """The suite that is named, or that the options are for; one that can run here and reads all of them."""
    from vdcore_bench import suites

    name = name or ("models" if given.models else "gpu" if given.parts else "operators")
    chosen = suites.find(name)
    others = [f"--{NAMES.get(field, field).replace('_', '-')}" for field in sorted(given.named() - chosen.TAKES)]
    if others:
        raise typer.BadParameter(f"the suite {name} does not take it", param_hint=" ".join(dict.fromkeys(others)))
    reason = chosen.why_not(given) if hasattr(chosen, "why_not") else None
    if reason is not None:
        print(f"vdcore bench {name}: {reason}", file=sys.stderr)
        raise typer.Exit(1)
    return name


def _peers(specs: list[str] | None) -> tuple[frozenset[str], tuple[Peer, ...]]:
    """Names of baselines, and those of the user's own."""
    from vdcore_bench import peers
    from vdcore_bench.suites.models import block

    own = [spec for spec in options.split(specs) if ":" in spec]
    try:
        found = tuple(map(peers.from_user, own))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--peer") from None
    names = [name for name in options.split(specs) if name not in own]
    return frozenset(options.known("--peer", names, dict.fromkeys([*peers.names(), *block.PEERS]))), found


def _compare(a: str, b: str) -> None:
    from vdcore_bench.measure import journal
    from vdcore_bench.report import compare, console, terminal

    try:
        rows = [journal.load(source) for source in (a, b)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from None
    console.print_comparison(terminal.make_console(), compare.compare(*rows))


def _readme(path: Path) -> None:
    from vdcore_bench.report import readme

    try:
        readme.write(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--readme") from None
