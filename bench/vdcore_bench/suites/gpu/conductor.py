"""The suite's own process: starts the parts, takes their rows as they come, and goes on behind what hangs or dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from vdcore_bench.measure.journal import Journal, Row, Watch, parse
from vdcore_bench.suites import Options
from vdcore_bench.suites.gpu.child import HUNG, Given, dry_row
from vdcore_bench.suites.gpu.plan import PARTS

TAKES = frozenset({"parts"})
RESTARTS = 10  # of a part
MARGIN = 40.0  # seconds before its end in which a part begins no step
POLL = 0.25
WITHOUT_GPU = frozenset({"selfcheck", "build"})


def why_not(options: Options) -> str | None:
    return None if torch.cuda.is_available() else "no GPU is visible to torch"


def until(seconds: float) -> float:
    """When the last step of a part may begin, of time.monotonic()."""
    return time.monotonic() + max(seconds - MARGIN, seconds / 2)


@dataclass
class Child:
    """A part's process, and how much of its rows has been taken."""

    given: Given
    process: subprocess.Popen[bytes]
    taken: int = 0

    @staticmethod
    def start(given: Given) -> Child:
        values = {f.name: getattr(given, f.name) for f in fields(given)}
        options = [f"--{name}={value}" for name, value in values.items() if not isinstance(value, bool)]
        options += [f"--parent={os.getpid()}", *(["--dry"] if given.dry else [])]
        # What shards do on the processor is the float64 oracle: 8 of them with all threads each would only wait.
        env = {**os.environ, "TRITON_INTERPRET": "0"}
        if given.shards > 1 or given.dry:
            env["OMP_NUM_THREADS"] = "1" if given.dry else "2"
        with given.file("log").open("wb") as log:
            command = [sys.executable, "-m", "vdcore_bench.suites.gpu", *options]
            return Child(given, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))

    def rows(self) -> list[Row]:
        """Those that are new since the last time; a line that is still being written waits."""
        path = self.given.file("jsonl")
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self.taken)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.taken += len(whole)
        rows = parse(whole.decode())
        return [dry_row(row) for row in rows] if self.given.dry else rows

    def at(self) -> tuple[int, str]:
        """Number and name of the step under way; "": between two of them."""
        try:
            found = json.loads(self.given.file("at").read_text())
        except (OSError, json.JSONDecodeError):
            return self.given.first, ""
        return found["number"], found["name"]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Its rows stand in the journal; its log stays."""
        for suffix in ("jsonl", "at"):
            self.given.file(suffix).unlink(missing_ok=True)


def ending(code: int | None, seconds: float) -> str:
    """How a process went, in words."""
    if code is None:
        return f"it took more than {seconds:.0f} s"
    return "it hung" if code == HUNG else f"its process ended with {code}: see its log"


def trouble(given: Given, reason: str) -> Row:
    row = Row(op=given.part, workload="", provider="all", mode="fwd", status="failed", reason=reason, device="cuda")
    return dry_row(row) if given.dry else row


@dataclass
class Conductor:
    """Runs parts into a journal; ``trouble`` counts what did not go as it should."""

    out: Path
    journal: Journal
    arch: str = "sm_90"
    dry: bool = False
    troubles: int = 0
    children: list[Child] = field(default_factory=list)

    def run(self, name: str, seconds: float) -> None:
        """One part, with all its shards, in at most these seconds."""
        part, end = PARTS[name], time.monotonic() + seconds
        shards = 2 if self.dry and part.shards > 1 else part.shards
        for shard in range(shards):
            given = Given(name, self.out, shard, shards, 0, until(seconds), part.patience, self.arch, self.dry)
            self.children.append(Child.start(given))
        restarts = 0
        try:
            while self.children and time.monotonic() < end:
                time.sleep(POLL)
                for child in list(self.children):
                    code = child.process.poll()
                    self.journal.add(child.rows())
                    if code is None:
                        continue
                    self.children.remove(child)
                    if code != 0:
                        restarts += 1
                        self._behind(child, code, end if restarts <= RESTARTS else 0.0)
                    child.forget()
        finally:
            for child in self.children:
                child.stop()
                self.journal.add(child.rows())
                if time.monotonic() >= end:
                    self._report(child, ending(None, seconds))
                child.forget()
            self.children.clear()

    def _behind(self, child: Child, code: int, end: float) -> None:
        """A row for the step that did not end well, and a process for what follows."""
        number, step = child.at()
        self._report(child, f"{step}: {ending(code, 0)}" if step else ending(code, 0))
        if step and time.monotonic() < end - 5:
            values = {f.name: getattr(child.given, f.name) for f in fields(Given)} | {"first": number + 1}
            self.children.append(Child.start(Given(**values)))

    def _report(self, child: Child, reason: str) -> None:
        self.troubles += 1
        self.journal.add([trouble(child.given, reason)])


def salvage(out: Path, known: Sequence[Row]) -> Iterator[Row]:
    """Rows of parts whose suite was killed before it took them."""
    lines = {row.to_json() for row in known}
    for path in sorted(out.glob("*-*-*.jsonl")):
        for row in parse(path.read_text()):
            if row.to_json() not in lines and dry_row(row).to_json() not in lines:
                yield row
        path.unlink()


def arch_here() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def run(options: Options, journal: Journal, watch: Watch, *, dry: bool = False) -> int:
    """The parts that the options name, or all, each in its seconds; their logs lie beside the journal.

    Returns:
        How many parts, shards and steps were lost; each is a row with its reason.
    """
    out, wanted = journal.path.parent.resolve(), options.parts or tuple(PARTS)
    arch = arch_here() if torch.cuda.is_available() and not dry else "sm_90"
    conductor = Conductor(out, journal, arch, dry)
    with watch.part("GPU"):
        for number, name in enumerate(wanted):
            watch.step(name, number, len(wanted))
            before = len(journal.rows)
            conductor.run(name, PARTS[name].seconds)
            watch.done(journal.rows[before:])
    return conductor.troubles
