"""One row per measurement, one line per row: results.jsonl."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch

from vdcore_bench.measure import machine
from vdcore_bench.measure.timing import Spread

fcntl: Any = None
if sys.platform != "win32":
    import fcntl

FILE = "results.jsonl"
# How the case of a row against frames begins, of one of the masks over frames, of one on a grid, and of a config row
# that is swept.
PROFILE, MASKS, GRID_MASKS, SWEEP = "profile: ", "masks: ", "grid masks: ", "sweep: "
JOINED = "raced with compiled peers"  # in the reason of rows of a job's second race


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Row:
    """One measurement of one provider.

    Args:
        op: the public function, or ``"spatial + temporal"`` in the profile.
        workload: its name in workloads.json.
        case: what else belongs to the job: its mask, norm and rope.
        provider: ``"vdcore[cpu]"``, ``"sdpa[flash]"``, ``"copy"``, ...
        variant: how the provider was called, e.g. ``"strided"``; ``"auto"`` for the backend that vdcore chooses.
        mode: ``"fwd"``, ``"bwd"`` or ``"fwd+bwd"``.
        metric: ``"time"``, ``"memory"`` (peak beyond the inputs) ``"overhead"`` (time of a tiny call)
            ``"tangents"`` (time of a Jacobian-vector product) or ``"gradient_error"``.
        unit: ``"s"``, ``"bytes"`` or ``"relative"``.
        x: frames; tokens, of errors.
        p20, p50, p80: of the samples; a prediction stands in p50 alone.
        samples: how many there are.
        error_ratio: error over what vdcore.testing.error_ratio allows, fine up to 1; None where it was not taken.
        status: ``"ok"``, ``"skipped"`` (not usable here), ``"predicted"`` (would not fit) or ``"failed"``.
        reason: why it is not ok, or what to know about it.
        host: seconds of Python until a call was enqueued, on a GPU; ``p50`` is the GPU's time alone.
        page_faults: minor faults per call, CPU only; many mean that the allocator was measured.
        flops, bytes: work of the job, visible pairs only, and its least traffic: inputs read, outputs written.
        products: seconds of those FLOPs at 70 % of the rate of torch's product of matrices, CPU only.
        original, shape: sizes of the workload, and those that ran; ``scaling`` is both in words.
    """

    op: str
    workload: str
    provider: str
    mode: str
    metric: str = "time"
    unit: str = "s"
    case: str = "plain"
    variant: str = ""
    x: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    samples: int = 0
    error_ratio: float | None = None
    status: str = "ok"
    reason: str = ""
    host: float | None = None
    page_faults: float | None = None
    flops: float | None = None
    bytes: float | None = None
    products: float | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    allocator: str = ""
    original: dict[str, int] = field(default_factory=dict)
    shape: dict[str, int] = field(default_factory=dict)
    scaling: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    commit: str | None = None
    time: str = field(default_factory=now)

    def job(self) -> tuple[Any, ...]:
        """What makes two rows measurements of the same job."""
        sizes = tuple(sorted(self.shape.items()))
        return (self.op, self.workload, self.case, self.mode, self.dtype, self.device, self.threads, self.x, sizes)

    def key(self) -> tuple[Any, ...]:
        """What makes two rows measurements of the same thing."""
        return (*self.job(), self.provider, self.variant, self.metric)

    def measured(self, spread: Spread, **rest: Any) -> Row:
        """With the numbers of some samples, and other changes."""
        s = spread
        return replace(self, p20=s.p20, p50=s.p50, p80=s.p80, samples=s.samples, **rest)

    def to_json(self) -> str:
        values = asdict(self)
        ratio = self.error_ratio  # JSON has no infinity
        values["error_ratio"] = ratio if ratio is None or math.isfinite(ratio) else str(ratio)
        return json.dumps(values, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> Row:
        """Reads rows of other versions too: fields it does not know are left out."""
        known = {f.name for f in fields(Row)}
        values = {key: value for key, value in json.loads(line).items() if key in known}
        if isinstance(values.get("error_ratio"), str):
            values["error_ratio"] = float(values["error_ratio"])
        return Row(**values)


def row_here(device: str, dtype: torch.dtype, **values: Any) -> Row:
    """A row with what this machine says: threads, allocator, versions, commit."""
    here: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "allocator": "torch" if device.startswith("cuda") else machine.heap(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    return Row(device=device, dtype=str(dtype).removeprefix("torch."), **{**here, **values})


def text_of(*parts: str) -> str:
    """The parts that say something, as one reason."""
    return "; ".join(filter(None, parts))


class Journal:
    """Appends every row to a file the moment it exists, and remembers it; rows of earlier runs stay in the file.

    Args:
        keep: rows that the file holds are remembered too, as of this run.

    Raises:
        BlockingIOError: another run writes into it.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path, self.rows = path, list[Row]()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        try:
            _lock(self._file)
        except BlockingIOError:
            self._file.close()
            raise
        _end_line(path)
        if keep:
            self.rows = parse(path.read_text())

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            self._file.write(row.to_json() + "\n")
        self._file.flush()

    def of(self, row: Row) -> list[Row]:
        """Rows of the same job."""
        return [other for other in self.rows if other.job() == row.job()]

    def close(self) -> None:
        if fcntl is not None and not self._file.closed:  # a process that was forked meanwhile has it open too
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _lock(file: IO[str]) -> None:
    """Until it is closed, or its process ends, nobody else has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = f"{file.name}: another run writes into it: name another folder, or wait for its end"
        raise BlockingIOError(text) from None
    except OSError:  # a file system without locks
        pass


def _end_line(path: Path) -> None:
    """A kill may have cut the last line off: what is not a whole row goes, so that the next one has its own line."""
    text = path.read_bytes()
    end = text.rfind(b"\n") + 1
    if end == len(text):
        return
    try:
        json.loads(text[end:])
    except ValueError:
        os.truncate(path, end)
    else:
        with path.open("ab") as file:
            file.write(b"\n")


class Watch:
    """Is told how a run goes; this one keeps silent."""

    def part(self, title: str) -> AbstractContextManager[Any]:
        """Inside, a part of the run with a title is under way."""
        return nullcontext()

    def step(self, what: str, number: int, total: int) -> None:
        """The step of this number begins."""

    def doing(self, what: str) -> None:
        """Within a step."""

    def done(self, rows: Sequence[Row]) -> None:
        """All rows of what a step measured, also those of an earlier race."""


def parse(text: str) -> list[Row]:
    """Rows of JSON lines; a last line that a crash cut off is left out."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(Row.from_json(line))
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise
    return rows


def newest(rows: Iterable[Row], key: Callable[[Row], Hashable] = Row.key) -> list[Row]:
    """Of several measurements of the same thing the last, where the first one stood."""
    return list({key(row): row for row in rows}.values())


def load(source: str, root: Path | None = None) -> list[Row]:
    """Rows of a file, of a folder, or of ``bench/results`` at a commit.

    Args:
        source: a path, or anything that git understands as a commit.
        root: the repository; default: the working directory.

    Raises:
        ValueError: if it is none of these, or holds no rows.
    """
    path = Path(source)
    if path.is_file():
        rows = parse(path.read_text())
    elif path.is_dir():
        files = [path / FILE] if (path / FILE).exists() else sorted(path.rglob("*.jsonl"))
        rows = [row for file in files for row in parse(file.read_text())]
    else:
        rows = _load_commit(source, root or Path.cwd())
    if not rows:
        raise ValueError(f"{source}: no results in it")
    return rows


def _load_commit(name: str, root: Path) -> list[Row]:
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()
        files = git("ls-tree", "-r", "--name-only", commit, "--", "bench/results").splitlines()
        texts = [git("show", f"{commit}:{file}") for file in files if file.endswith(".jsonl")]
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{name}: neither a file, nor a folder, nor a commit of this repository") from None
    return [row for text in texts for row in parse(text)]
