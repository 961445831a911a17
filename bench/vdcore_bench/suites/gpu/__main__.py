"""``python -m vdcore_bench.suites.gpu``: the suite, and, with ``--part``, one part inside its own process."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from vdcore_bench.measure.journal import FILE, Journal, Row, Watch
from vdcore_bench.suites import Options, gpu
from vdcore_bench.suites.gpu.child import Given, die_with_parent
from vdcore_bench.suites.gpu.conductor import WITHOUT_GPU, salvage

PROGRAM = "python -m vdcore_bench.suites.gpu"


class Progress(Watch):
    """A line per part."""

    def step(self, what: str, number: int, total: int) -> None:
        print(f"{number + 1} of {total}: {what}: {gpu.PARTS[what].what}", file=sys.stderr, flush=True)

    def done(self, rows: Any) -> None:
        count = {status: sum(row.status == status for row in rows) for status in ("ok", "failed", "skipped")}
        print(f"  {len(rows)} rows: {count}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=gpu.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--only", help="parts to run, such as ceilings,benchmarks", default="")
    parser.add_argument("--dry", action="store_true", help="without a GPU, on a stub of its driver")
    inside = parser.add_argument_group("inside of a part's process")
    inside.add_argument("--part", choices=gpu.PARTS)
    for name in ("shard", "first"):
        inside.add_argument(f"--{name}", type=int, default=0)
    inside.add_argument("--shards", type=int, default=1)
    inside.add_argument("--until", type=float, default=math.inf)
    inside.add_argument("--patience", type=float, default=90.0)
    inside.add_argument("--arch", default="sm_90")
    inside.add_argument("--parent", type=int, default=os.getppid(), help="process that it ends with")
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.part:
        names = ("part", "out", "shard", "shards", "first", "until", "patience", "arch", "dry")
        _child(Given(**{name: getattr(args, name) for name in names}), args.parent)
    wanted = tuple(name for name in args.only.split(",") if name)
    if unknown := [name for name in wanted if name not in gpu.PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(gpu.PARTS)}")
    options = Options(parts=wanted, device="cuda")
    reason = None if args.dry or (wanted and WITHOUT_GPU.issuperset(wanted)) else gpu.why_not(options)
    if reason:
        print(f"{PROGRAM}: no GPU, nothing to measure: {reason}")
        return
    try:
        journal = Journal(args.out / FILE, keep=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    sys.exit(_suite(journal, options, args.dry))


def _stop(signal_: int, _: Any) -> NoReturn:
    """Ends the suite, which stops its parts."""
    sys.exit(128 + signal_)


def _suite(journal: Journal, options: Options, dry: bool) -> int:
    """All of it; rows of earlier runs into the same folder stay. 1 where something was lost."""
    from vdcore_bench.report import results

    begin = time.monotonic()
    journal.add(list(salvage(journal.path.parent.resolve(), journal.rows)))
    before = len(journal.rows)
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, _stop)
    try:
        troubles = gpu.run(options, journal, Progress(), dry=dry)
    except SystemExit:
        print(f"stopped: {len(journal.rows)} rows are in {journal.path}; the next run adds to them", file=sys.stderr)
        raise
    finally:
        journal.close()
    new: list[Row] = journal.rows[before:]
    for table in results.measured("Operators", journal.rows) if not dry else gpu.tables(new):
        print(table.plain())
    wrong = sum(row.status == "failed" and row.metric in ("error", "tests") for row in new)
    print(f"{len(new)} rows in {time.monotonic() - begin:.0f} s: {wrong} wrong, {troubles} that a part lost")
    return 1 if troubles or wrong else 0


def _child(given: Given, parent: int) -> NoReturn:
    die_with_parent(parent)
    if given.dry:
        from vdcore_bench import stub

        stub.install(given.arch, given.out / "stub")
    from vdcore_bench.suites.gpu import parts

    parts.run_part(given, Journal(given.file("jsonl")))
    sys.stdout.flush()
    sys.exit(0)


if __name__ == "__main__":
    main()
