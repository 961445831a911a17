"""The parts of the suite, as they run inside of their own processes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore import FrameMask
from vdcore_bench.jobs.base import Job
from vdcore_bench.measure.journal import PROFILE, Journal, Row
from vdcore_bench.measure.memory import peak_of
from vdcore_bench.measure.timing import Spread, race_calls
from vdcore_bench.suites.gpu import sweep
from vdcore_bench.suites.gpu.child import Given, Steps
from vdcore_bench.suites.gpu.plan import FRAMES, FUSED, ROOT, STRONGEST, items, tests
from vdcore_bench.suites.operators import jobs
from vdcore_bench.suites.runner import Settings, first_line, run_jobs

IMPORTED = ("cProfile", "torch._dynamo", "torch._inductor", "pytest", "pytest_benchmark.plugin", "triton")
OPTIONAL = ("pytest", "pytest_benchmark.plugin")
DRY_FRAMES = (2, 3)


def run_part(given: Given, journal: Journal) -> None:
    """What the part does; leaves the process with the part's own code where it has one."""
    parts: dict[str, Callable[[Given, Journal], None]] = {
        "selfcheck": selfcheck,
        "build": build,
        "compile": sweep.compile_ahead,
        "smoke": smoke,
        "ceilings": ceilings,
        "benchmarks": benchmarks,
        "correctness": correctness,
        "contract": contract,
        "slow": slow,
        "frames": frames,
        "sweep": sweep.sweep,
    }
    parts[given.part](given, journal)


# ---- Before anything is measured ----


def selfcheck(given: Given, journal: Journal) -> None:
    """A module of ours that hides one of the standard library's, or a file that was renamed, ends a run at once."""
    for name in IMPORTED:
        row = given.row(op="selfcheck", provider="python", mode="fwd", metric="tests", unit="tests", case=name)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = name in OPTIONAL and error.name is not None and name.startswith(error.name)
            row = replace(row, status="skipped" if missing else "failed", reason=first_line(error))
        except Exception as error:
            row = replace(row, status="failed", reason=first_line(error))
        journal.add([row])
    for path in tests():
        status = "ok" if path.is_file() else "failed"
        row = given.row(op="selfcheck", provider="files", mode="fwd", metric="tests", unit="tests", case=path.name)
        journal.add([replace(row, status=status, reason="" if status == "ok" else f"there is no {path}")])


def build(given: Given, journal: Journal) -> None:
    """Brings the compiled modules up to date, CUDA's too where nvcc is: without it every row of it is skipped."""
    row = given.row(op="build", provider="vdcore[cuda]", mode="fwd", metric="tests", unit="tests", case="setup.py")
    if not (ROOT / "setup.py").is_file():
        journal.add([replace(row, status="skipped", reason="not a checkout: there is nothing to build")])
        return
    env, nvcc = dict(os.environ), shutil.which("nvcc")
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    env["VDCORE_CUDA"] = "ON" if nvcc else "OFF"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if given.dry:
        command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        row = replace(row, status="failed", reason=f"it ended with {done.returncode}: {last[:300]}")
    elif nvcc is None:
        row = replace(row, status="skipped", reason="no nvcc: rows of vdcore[cuda] will be skipped")
    journal.add([row])


# ---- The card ----


def ceilings(given: Given, journal: Journal) -> None:
    """What memory and matrix units of this card give: a copy of 4 GiB, a product of 8192 cubed. No zeros: random."""
    n, count = (64, 2**12) if given.dry else (8192, 2**30)
    x = torch.randn(count, device=given.device, dtype=torch.float32)
    y = torch.empty_like(x)
    a, b = (torch.randn(n, n, device=given.device, dtype=torch.bfloat16) for _ in range(2))
    work: dict[str, dict[str, Any]] = {"copy": {"bytes": 2.0 * x.nbytes, "workload": "4 GiB"}}
    work |= {"matmul": {"flops": 2.0 * n**3, "workload": "8192 cubed"}}
    spreads = race_calls({"copy": lambda: y.copy_(x), "matmul": lambda: a @ b}, 20, given.device)
    journal.add(
        given.row(op="ceiling", mode="fwd", provider=who, **work[who]).measured(s) for who, s in spreads.items()
    )


# ---- Right or wrong ----

Judged = tuple[Any, torch.dtype, str]  # a case, its dtype, the backend


def _cases(backends: tuple[str, ...] = ("triton", "cuda")) -> list[Judged]:
    from vdcore.ops.choose import BACKENDS
    from vdcore.testing import CASES

    cases = [(case, torch.bfloat16) for case in CASES]
    cases += [(case, torch.float16) for case in CASES if "plain" in case.tags]
    return [(case, dtype, name) for name in backends for case, dtype in cases if case.op in BACKENDS[name].operators]


def smoke(given: Given, journal: Journal) -> None:
    """The first plain case of every operator: what is broken altogether shows in seconds."""
    first = {(case.op, backend): (case, dtype, backend) for case, dtype, backend in reversed(_cases()) if case.tags}
    _judge_all(list(first.values())[::-1], given, journal)


def correctness(given: Given, journal: Journal) -> None:
    """Every case in bfloat16, plain ones in float16 too, by the tolerance rule."""
    found = _cases()
    if given.dry:
        found = [(case, dtype, name) for case, dtype, name in found if "plain" in case.tags and dtype == torch.bfloat16]
    _judge_all(found, given, journal)


def _judge_all(judged: list[Judged], given: Given, journal: Journal) -> None:
    steps = Steps(given, journal)
    for case, dtype, backend in steps(judged, lambda j: f"{j[0].op}, {j[0].name}, {j[1]}, {j[2]}"):
        journal.add([_judged(case, dtype, backend, given)])


def _judged(case: Any, dtype: torch.dtype, backend: str, given: Given) -> Row:
    from vdcore.testing import judge

    row = given.row(dtype, metric="error", unit="ratio", op=case.op, case=case.name, mode="fwd+bwd")
    row = replace(row, provider=f"vdcore[{backend}]")
    try:
        reasons = [
            dict(vdcore.explain(case.op, **case.inputs(dtype, device=given.device, requires_grad=grad).args))[backend]
            for grad in (True, False)
        ]
        row = replace(row, mode="fwd" if reasons[0] is not None else "fwd+bwd")
        if reasons[1] is not None:
            return replace(row, status="skipped", reason=reasons[1])
        ratios = judge(case, backend, dtype, device=given.device, gradients=row.mode == "fwd+bwd")
    except Exception as error:
        return replace(row, status="failed", reason=first_line(error))
    if given.dry:
        return replace(row, reason="launched, not computed")
    worst = max(ratios, key=lambda name: ratios[name].worst)
    ratio = ratios[worst].worst
    reason = "" if ratio <= 1 else f"error of {worst} over what is allowed"
    return replace(row, error_ratio=ratio, status="ok" if ratio <= 1 else "failed", reason=reason)


def contract(given: Given, journal: Journal) -> None:
    """The tests that need a GPU, but for the numbers, which the correctness part has. A dry run collects them."""
    import pytest

    base = given.row(op="contract", provider="vdcore[triton]", mode="fwd+bwd", metric="tests", unit="tests")

    class Rows:
        count = 0

        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            self.count += len(items) if given.dry else 0

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.count += 1
            if report.when == "call" or report.outcome != "passed":
                status = {"passed": "ok", "failed": "failed", "skipped": "skipped"}[report.outcome]
                reason = str(report.longrepr).strip().splitlines()[-1] if report.failed else ""
                journal.add([replace(base, case=report.nodeid.split("::", 1)[-1], status=status, reason=reason)])

    rows = Rows()
    options = ["-q", "--maxfail=20", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    options += ["--collect-only"] if given.dry else []
    code = int(pytest.main([*options, *map(str, tests())], [rows]))
    if given.dry:
        journal.add([replace(base, case="collected", reason=f"{rows.count} tests, not run")])
    if code > 1 or not rows.count:  # 1: tests fail, which are rows
        sys.exit(code or 5)


# ---- Times ----


def _jobs(given: Given, journal: Journal) -> list[Job]:
    wanted, impossible = jobs(items(given.dry), given.device, given.budget)
    if given.first == 0:
        journal.add(impossible)
    return wanted


def benchmarks(given: Given, journal: Journal) -> None:
    """vdcore beside the strongest of its peers; what is compiled only where there is something to fuse."""
    steps, memory = Steps(given, journal), int(given.memory * 0.9)
    for job in steps(_jobs(given, journal), lambda job: job.title):
        fused = job.op in FUSED
        peers, compiled = None if fused else STRONGEST, fused and not given.dry
        settings = Settings(given.seconds, memory=memory, peers=peers, compiled=compiled)
        run_jobs([job], replace(settings, slow_start=False, until=given.until), journal)


def slow(given: Given, journal: Journal) -> None:
    """Attention against all of its peers, those that compile for many seconds too where they have a mask."""
    steps, memory = Steps(given, journal), int(given.memory * 0.9)
    attention = [job for job in _jobs(given, journal) if job.op not in FUSED][:: 3 if given.dry else 1]
    for job in steps(attention, lambda job: job.title):
        settings = Settings(given.seconds, memory=memory, compiled=not given.dry, slow_start=False, until=given.until)
        run_jobs([job], settings, journal)


def frames(given: Given, journal: Journal) -> None:
    """Naive N^2 attention and vdcore's over the same video: time, and memory beyond the inputs."""
    from vdcore.testing import TORCH_FORMS

    S, H, D = (16, 2, 16) if given.dry else (256, 16, 64)
    ours = partial(vdcore.video_attention, backend="triton")
    ways: dict[str, Callable[..., Any]] = {
        "naive": TORCH_FORMS["video_attention"]["naive"],
        "sdpa": TORCH_FORMS["video_attention"]["sdpa"],
        "vdcore[triton]": ours,
        "vdcore[triton], window 8": partial(ours, mask=FrameMask.window(8)),
    }
    points = [(T, name) for T in (DRY_FRAMES if given.dry else FRAMES) for name in ways]
    for T, name in Steps(given, journal)(points, lambda point: f"{point[1]} at {point[0]} frames"):
        size = {"B": 1, "T": T, "S": S, "H": H, "D": D}
        row = given.row(op="video_attention", workload="frames", case=f"{PROFILE}S {S}, {H} x {D}", x=float(T))
        row = replace(row, provider=name, mode="fwd+bwd", shape=size, original=size)
        # Of every pair: scores, probabilities, the gradients of both and one more in the making, 2 bytes each.
        need = 10.0 * H * (T * S) ** 2 if name == "naive" else 0.0
        if need > given.memory:
            row = replace(row, metric="memory", unit="bytes")
            journal.add([replace(row, status="predicted", p50=need, reason="would not fit")])
            continue
        one: dict[str, Any] = {"device": given.device, "dtype": torch.bfloat16, "requires_grad": True}
        leaves = [torch.randn(1, T, S, H, D, **one) for _ in "qkv"]
        journal.add(_measured(row, partial(_train, ways[name], leaves), given.device))


def _train(attend: Callable[..., Any], leaves: list[Tensor]) -> None:
    out = attend(**dict(zip("qkv", leaves)))
    torch.autograd.grad(out, leaves, out)


def _measured(row: Row, call: Callable[[], Any], device: str) -> Iterator[Row]:
    """Of memory, and of time."""
    try:
        call()
        peak = float(peak_of(call, device).bytes)
        yield replace(row, metric="memory", unit="bytes").measured(Spread.of([peak]))
        yield row.measured(race_calls({"": call}, 5, device)[""])
    except Exception as error:
        yield replace(row, status="failed", reason=first_line(error))
        if device == "cuda":
            torch.cuda.empty_cache()
