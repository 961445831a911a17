"""``vdcore bench gpu``; where there is nothing but torch and triton, ``python -m vdcore_bench.suites.gpu``.

Correctness of every operator, the contract tests that need a GPU, the card's ceilings, all operators against all
installed peers on models' shapes, and memory against frames: each part in processes of its own, so that one that
crashes or hangs is a row that says so. Rows go to results.jsonl as they come; a short table is printed last.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore import FrameMask
from vdcore_bench import workloads
from vdcore_bench.measure.journal import FILE, PROFILE, Journal, Row, Watch, parse, row_here
from vdcore_bench.measure.memory import peak_of
from vdcore_bench.measure.timing import Spread, race_calls
from vdcore_bench.report.table import Table
from vdcore_bench.suites import Options
from vdcore_bench.suites.operators import TRAINING, Item, jobs
from vdcore_bench.suites.runner import Settings, first_line, run_jobs

ROOT = Path(__file__).resolve().parents[3]  # of the checkout, whose tests are run
TAKES = frozenset({"parts"})
SECONDS = 520.0  # of the whole run
SHARDS = 8  # processes of the correctness part: what takes time there is compiling
BF16 = ("bfloat16",)
TESTS = [ROOT / "tests" / "gpu" / f"test_{name}.py" for name in ("contract", "configs", "cuda_backend")]
TESTS += [ROOT / "tests" / "ops" / f"test_{name}.py" for name in ("cuda", "cuda_frame_attention")]

# The claims to be measured, most telling first: the time of a run may end before the list does.
ITEMS = (
    Item("temporal_attention", "latte-1-512", TRAINING, BF16),
    Item("temporal_attention", "mochi-1-480p", TRAINING, BF16),
    Item("video_attention", "wan2.2-5b-704p", TRAINING, BF16),
    Item("spatial_attention", "stdit3-720p-102f", TRAINING, BF16),
    Item("gated_attention", "latte-1-512", TRAINING, BF16),
    Item("patchify", "wan2.2-5b-704p", TRAINING, BF16),
    Item("modulate", "wan2.2-5b-704p", TRAINING, BF16),
    Item("qk_norm_rope", "wan2.2-5b-704p", TRAINING, BF16),
    Item("temporal_attention", "stdit3-720p-102f", TRAINING, BF16),
    Item("temporal_attention", "svd-xt-level1", TRAINING, BF16),
    Item("temporal_attention", "animatediff-level1", TRAINING, BF16),
    Item("temporal_attention", "latte-1-512", TRAINING, BF16, norm_rope=True),
    Item("temporal_attention", "mochi-1-480p", TRAINING, BF16, norm_rope=True),
    Item("video_attention", "hunyuanvideo-720p", ("fwd",), BF16),
    Item("video_attention", "long-video-60f", TRAINING, BF16),
    Item("video_attention", "long-video-240f", ("fwd",), BF16),
    Item("video_attention", "self-forcing-1.3b", ("fwd",), BF16),
    Item("cross_attention", "wan2.2-5b-704p", TRAINING, BF16),
    Item("gate_residual", "wan2.2-5b-704p", TRAINING, BF16),
    Item("unpatchify", "wan2.2-5b-704p", TRAINING, BF16),
)
FRAMES = (8, 16, 32, 64, 128, 256)


# ---- Parts, each in its own process ----


def _row(dtype: torch.dtype = torch.bfloat16, **values: Any) -> Row:
    return row_here("cuda", dtype, **{"workload": "", **values})


def ceilings(journal: Journal) -> None:
    """What memory and matrix units of this card give: a copy of 4 GiB, a product of 8192 cubed."""
    n = 8192
    x = torch.randn(2**30, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    work: dict[str, dict[str, Any]] = {"copy": {"bytes": 2.0 * x.nbytes, "workload": "4 GiB"}}
    work |= {"matmul": {"flops": 2.0 * n**3, "workload": "8192 cubed"}}
    spreads = race_calls({"copy": lambda: y.copy_(x), "matmul": lambda: a @ b}, 20, "cuda")
    journal.add(_row(op="ceiling", mode="fwd", provider=who, **work[who]).measured(s) for who, s in spreads.items())


def correctness(journal: Journal, shard: int, first: int) -> None:
    """Every case in bfloat16, plain ones in float16 too, by the tolerance rule. Leaves when the GPU is lost."""
    from vdcore.ops.choose import BACKENDS
    from vdcore.testing import CASES, judge

    cases = [(case, torch.bfloat16) for case in CASES]
    cases += [(case, torch.float16) for case in CASES if "plain" in case.tags]
    jobs = [(case, dtype, "triton") for case, dtype in cases]
    jobs += [(case, dtype, "cuda") for case, dtype in cases if case.op in BACKENDS["cuda"].operators]
    for i, (case, dtype, backend) in enumerate(jobs):
        if i % SHARDS != shard or i < first:
            continue
        row = _row(dtype, metric="error", unit="ratio", op=case.op, case=case.name, mode="fwd+bwd")
        row = replace(row, provider=f"vdcore[{backend}]")
        try:
            if backend == "cuda":
                reasons = [
                    dict(vdcore.explain(case.op, **case.inputs(dtype, device="cuda", requires_grad=grad).args))[backend]
                    for grad in (True, False)
                ]
                row = replace(row, mode="fwd" if reasons[0] is not None else "fwd+bwd")
                if reasons[1] is not None:
                    journal.add([replace(row, status="skipped", reason=reasons[1])])
                    continue
            ratios = judge(case, backend, dtype, device="cuda", gradients=row.mode == "fwd+bwd")
            worst = max(ratios, key=lambda name: ratios[name].worst)
            ratio = ratios[worst].worst
            reason = "" if ratio <= 1 else f"error of {worst} over what is allowed"
            row = replace(row, error_ratio=ratio, status="ok" if ratio <= 1 else "failed", reason=reason)
        except Exception as error:
            row = replace(row, status="failed", reason=first_line(error))
        journal.add([row])
        if "CUDA error" in row.reason or "illegal" in row.reason:
            sys.exit(100 + i)


def contract(journal: Journal) -> None:
    """The tests marked gpu, but for the numbers, which the correctness part has."""
    import pytest

    base = _row(op="contract", provider="vdcore[triton]", mode="fwd+bwd", metric="tests", unit="tests")

    class Rows:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                status = {"passed": "ok", "failed": "failed", "skipped": "skipped"}[report.outcome]
                reason = str(report.longrepr).strip().splitlines()[-1] if report.failed else ""
                journal.add([replace(base, case=report.nodeid.split("::", 1)[-1], status=status, reason=reason)])

    pytest.main(["-q", "--maxfail=20", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *map(str, TESTS)], [Rows()])


def benchmarks(journal: Journal, until: float) -> None:
    budget = workloads.Budget(math.inf, torch.cuda.mem_get_info()[0] / 6)
    wanted, impossible = jobs(ITEMS, "cuda", budget)
    journal.add(impossible)
    memory = int(torch.cuda.mem_get_info()[0] * 0.9)
    run_jobs(wanted, Settings(seconds=0.5, memory=memory, slow_start=False, until=until), journal)


def frames(journal: Journal, until: float) -> None:
    """Naive N^2 attention and vdcore's over the same video: time, and memory beyond the inputs."""
    from vdcore.testing import TORCH_FORMS

    S, H, D = 256, 16, 64
    ours = partial(vdcore.video_attention, backend="triton")
    ways: dict[str, Callable[..., Any]] = {
        "naive": TORCH_FORMS["video_attention"]["naive"],
        "sdpa": TORCH_FORMS["video_attention"]["sdpa"],
        "vdcore[triton]": ours,
        "vdcore[triton], window 8": partial(ours, mask=FrameMask.window(8)),
    }
    for T in FRAMES:
        leaves = [torch.randn(1, T, S, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
        size = {"B": 1, "T": T, "S": S, "H": H, "D": D}
        for name, attend in ways.items():
            row = _row(op="video_attention", workload="frames", case=f"{PROFILE}S {S}, {H} x {D}", x=float(T))
            row = replace(row, provider=name, mode="fwd+bwd", shape=size, original=size)
            # Scores, probabilities and their gradients, as the naive form holds them.
            need = 8.0 * H * (T * S) ** 2 if name == "naive" else 0.0
            if time.monotonic() > until:
                journal.add([replace(row, status="skipped", reason="the time of the run was over")])
            elif need > torch.cuda.mem_get_info()[0]:
                row = replace(row, metric="memory", unit="bytes")
                journal.add([replace(row, status="predicted", p50=need, reason="would not fit")])
            else:
                journal.add(_measured(row, partial(_train, attend, leaves)))


def _train(attend: Callable[..., Any], leaves: list[Tensor]) -> None:
    out = attend(**dict(zip("qkv", leaves)))
    torch.autograd.grad(out, leaves, out)


def _measured(row: Row, call: Callable[[], Any]) -> Iterator[Row]:
    """Of memory, and of time."""
    try:
        call()
        peak = float(peak_of(call, "cuda").bytes)
        yield replace(row, metric="memory", unit="bytes").measured(Spread.of([peak]))
        yield row.measured(race_calls({"": call}, 5, "cuda")[""])
    except Exception as error:
        yield replace(row, status="failed", reason=first_line(error))
        torch.cuda.empty_cache()


# Name -> seconds at most.
PARTS = {"ceilings": 60.0, "correctness": 150.0, "contract": 120.0, "frames": 60.0, "benchmarks": SECONDS}


def run_part(name: str, out: Path, shard: int, first: int, until: float) -> None:
    journal = Journal(out / f"{name}-{shard}-{first}.jsonl")
    parts: dict[str, Callable[[], None]] = {
        "ceilings": lambda: ceilings(journal),
        "correctness": lambda: correctness(journal, shard, first),
        "contract": lambda: contract(journal),
        "frames": lambda: frames(journal, until),
        "benchmarks": lambda: benchmarks(journal, until),
    }
    parts[name]()


# ---- All of it ----


def _start(name: str, out: Path, seconds: float, shard: int = 0, first: int = 0) -> subprocess.Popen[bytes]:
    given = {"part": name, "out": out, "shard": shard, "first": first}
    given["until"] = time.monotonic() + max(seconds - 20, 5)
    command = [sys.executable, "-m", "vdcore_bench.suites.gpu", *(f"--{key}={value}" for key, value in given.items())]
    with (out / f"{name}-{shard}-{first}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _trouble(name: str, code: int | None, seconds: float) -> Row:
    reason = f"it took more than {seconds:.0f} s" if code is None else f"its process ended with {code}: see its log"
    return Row(op=name, workload="", provider="all", mode="fwd", status="failed", reason=reason, device="cuda")


def _run_correctness(out: Path, seconds: float) -> Iterable[Row]:
    """Shards side by side; one that lost its GPU starts again after the case that lost it."""
    end = time.monotonic() + seconds
    running = {shard: _start("correctness", out, seconds, shard) for shard in range(SHARDS)}
    lost = 0
    while running:
        for shard, process in list(running.items()):
            code = _wait(process, end - time.monotonic())
            del running[shard]
            if code is not None and code > 100 and lost < 10:
                lost += 1
                running[shard] = _start("correctness", out, end - time.monotonic(), shard, code - 100 + 1)
            elif code != 0:
                yield _trouble("correctness", code, seconds)


def _collect(out: Path, name: str) -> list[Row]:
    rows = []
    for path in sorted(out.glob(f"{name}-*-*.jsonl")):
        rows += parse(path.read_text())
        path.unlink()
    return rows


def why_not(options: Options) -> str | None:
    return None if torch.cuda.is_available() else "no GPU is visible to torch"


def run(options: Options, journal: Journal, watch: Watch) -> None:
    """The parts that the options name, or all, in :data:`SECONDS`; their logs lie beside the journal."""
    begin, out, wanted = time.monotonic(), journal.path.parent.resolve(), options.parts or tuple(PARTS)
    os.environ.setdefault("TRITON_INTERPRET", "0")
    with watch.part("GPU"):
        for number, name in enumerate(wanted):
            watch.step(name, number, len(wanted))
            before, seconds = len(journal.rows), min(PARTS[name], begin + SECONDS - time.monotonic())
            if seconds < 10:
                journal.add([_trouble(name, None, SECONDS)])
            elif name == "correctness":
                journal.add(_run_correctness(out, seconds))
            elif (code := _wait(_start(name, out, seconds), seconds)) != 0:
                journal.add([_trouble(name, code, seconds)])
            journal.add(_collect(out, name))
            watch.done(journal.rows[before:])


def tables(rows: Iterable[Row]) -> list[Table]:
    """The card's ceilings, what was right, and what was not; without rows of this suite, none."""
    rows = list(rows)
    rates, counts, bad = [], [], []
    for row in rows:
        if row.op == "ceiling" and row.p50:
            gigabytes, teraflops = (row.bytes or 0.0) / row.p50 / 1e9, (row.flops or 0.0) / row.p50 / 1e12
            rates.append((row.provider, f"{gigabytes:.0f} GB/s" if row.bytes else f"{teraflops:.0f} TFLOP/s"))
        if row.op in PARTS or (row.metric in ("error", "tests") and row.status == "failed"):
            bad.append((row.op, row.case, row.dtype, row.status, row.reason, row.error_ratio))
    for what, metric in (("correctness", "error"), ("contract", "tests")):
        chosen = [r for r in rows if r.metric == metric]
        failed = sum(r.status == "failed" for r in chosen)
        worst = max((r.error_ratio or 0.0 for r in chosen), default=0.0)
        counts.append((what, f"{failed} of {len(chosen)}", worst or None)) if chosen else None
    made = [
        Table.of(("ceiling", "rate"), rates, "Ceilings of this GPU"),
        Table.of(("part", "failed", "worst error ratio"), counts, "Correctness"),
        Table.of(("part or operator", "case", "dtype", "status", "why", "error ratio"), bad[:12], "Failed", text=True),
    ]
    return [table for table in made if table.rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vdcore_bench.suites.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", help="parts to run, such as ceilings,benchmarks", default=",".join(PARTS))
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--until", type=float, default=math.inf)
    args = parser.parse_args()
    if args.part:
        return run_part(args.part, args.out, args.shard, args.first, args.until)
    options = Options(parts=tuple(args.only.split(",")), device="cuda")
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if reason := why_not(options):
        sys.exit(f"{parser.prog}: {reason}")
    from vdcore_bench.report import results

    begin, journal = time.monotonic(), Journal(args.out / FILE)
    run(options, journal, Watch())
    journal.close()
    for table in results.measured("Operators", journal.rows):
        print(table.plain())
    print(f"{len(journal.rows)} rows in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
