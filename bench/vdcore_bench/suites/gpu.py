"""The GPU suite: ``python3 bench/gpu.py [--out DIR]`` in a checkout, on a machine with a CUDA GPU; installs nothing.

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
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def importable() -> None:
    """Makes ``vdcore`` of this checkout importable, with its kernels and benchmark, where it is not installed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import vdcore

    if str(ROOT) not in vdcore.__path__:
        vdcore.__path__.append(str(ROOT))


importable()

import torch  # noqa: E402

import vdcore  # noqa: E402
from vdcore import FrameMask  # noqa: E402
from vdcore_bench import workloads  # noqa: E402
from vdcore_bench.jobs import make  # noqa: E402
from vdcore_bench.measure.journal import FILE, Journal, Row, parse  # noqa: E402
from vdcore_bench.measure.timing import Spread  # noqa: E402
from vdcore_bench.report import curves, summary  # noqa: E402
from vdcore_bench.suites import operators as suite  # noqa: E402
from vdcore_bench.suites.runner import Settings, blank, first_line, run_jobs  # noqa: E402

SECONDS = 520.0  # of the whole run
SHARDS = 8  # processes of the correctness part: what takes time there is compiling
BF16 = ("bfloat16",)
TRAINING = ("fwd", "fwd+bwd")

# The claims to be measured, most telling first: the time of a run may end before the list does.
ITEMS = (
    suite.Item("temporal_attention", "latte-1-512", TRAINING, BF16),
    suite.Item("temporal_attention", "mochi-1-480p", TRAINING, BF16),
    suite.Item("video_attention", "wan2.2-5b-704p", TRAINING, BF16),
    suite.Item("spatial_attention", "stdit3-720p-102f", TRAINING, BF16),
    suite.Item("gated_attention", "latte-1-512", TRAINING, BF16),
    suite.Item("patchify", "wan2.2-5b-704p", TRAINING, BF16),
    suite.Item("modulate", "wan2.2-5b-704p", TRAINING, BF16),
    suite.Item("qk_norm_rope", "wan2.2-5b-704p", TRAINING, BF16),
    suite.Item("temporal_attention", "stdit3-720p-102f", TRAINING, BF16),
    suite.Item("temporal_attention", "svd-xt-level1", TRAINING, BF16),
    suite.Item("temporal_attention", "animatediff-level1", TRAINING, BF16),
    suite.Item("temporal_attention", "latte-1-512", TRAINING, BF16, norm_rope=True),
    suite.Item("temporal_attention", "mochi-1-480p", TRAINING, BF16, norm_rope=True),
    suite.Item("video_attention", "hunyuanvideo-720p", ("fwd",), BF16),
    suite.Item("video_attention", "long-video-60f", TRAINING, BF16),
    suite.Item("video_attention", "long-video-240f", ("fwd",), BF16),
    suite.Item("video_attention", "self-forcing-1.3b", ("fwd",), BF16),
    suite.Item("cross_attention", "wan2.2-5b-704p", TRAINING, BF16),
    suite.Item("gate_residual", "wan2.2-5b-704p", TRAINING, BF16),
    suite.Item("unpatchify", "wan2.2-5b-704p", TRAINING, BF16),
)
FRAMES = (8, 16, 32, 64, 128, 256)


# ---- Parts, each in its own process ----


def _base() -> Row:
    like = make("modulate", workloads.load()["latte-1-512"], dtype=torch.bfloat16, device="cuda")
    return replace(blank(like), workload="", x=None, flops=None, bytes=None, original={}, shape={}, scaling="")


def _seconds(call: Any, repeats: int = 20) -> list[float]:
    """GPU time of single calls, after three to warm up."""
    for _ in range(3):
        call()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return found


def ceilings(journal: Journal) -> None:
    """What memory and matrix units of this card give: a copy of 4 GiB, a product of 8192 cubed."""
    base = replace(_base(), op="ceiling", mode="fwd")
    x = torch.randn(2**30, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    row = replace(base, provider="copy", bytes=2.0 * x.numel() * x.element_size(), workload="4 GiB")
    journal.add([row.measured(Spread.of(_seconds(lambda: y.copy_(x))))])
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    row = replace(base, provider="matmul", flops=2.0 * n**3, workload="8192 cubed")
    journal.add([row.measured(Spread.of(_seconds(lambda: a @ b)))])


def correctness(journal: Journal, shard: int, first: int) -> None:
    """Every case in bfloat16, plain ones in float16 too, by the tolerance rule. Leaves when the GPU is lost."""
    from vdcore.ops.choose import BACKENDS
    from vdcore.testing import CASES, judge

    cases = [(case, torch.bfloat16) for case in CASES]
    cases += [(case, torch.float16) for case in CASES if "plain" in case.tags]
    jobs = [(case, dtype, "triton") for case, dtype in cases]
    jobs += [(case, dtype, "cuda") for case, dtype in cases if case.op in BACKENDS["cuda"].operators]
    base = replace(_base(), metric="error", unit="ratio")
    for i, (case, dtype, backend) in enumerate(jobs):
        if i % SHARDS != shard or i < first:
            continue
        row = replace(base, op=case.op, case=case.name, dtype=str(dtype).removeprefix("torch."))
        row = replace(row, provider=f"vdcore[{backend}]", mode="fwd+bwd")
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

    base = replace(_base(), op="contract", provider="vdcore[triton]", mode="fwd+bwd", metric="tests", unit="tests")

    class Rows:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                status = {"passed": "ok", "failed": "failed", "skipped": "skipped"}[report.outcome]
                reason = str(report.longrepr).strip().splitlines()[-1] if report.failed else ""
                journal.add([replace(base, case=report.nodeid.split("::", 1)[-1], status=status, reason=reason)])

    files = [str(ROOT / "tests" / "gpu" / name) for name in ("test_contract.py", "test_configs.py", "test_cuda.py")]
    files += [str(ROOT / "tests" / "ops" / name) for name in ("test_cuda.py", "test_cuda_frame_attention.py")]
    pytest.main(["-q", "--maxfail=20", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files], [Rows()])


def benchmarks(journal: Journal, until: float) -> None:
    budget = workloads.Budget(math.inf, torch.cuda.mem_get_info()[0] / 6)
    jobs, impossible = suite.jobs(ITEMS, "cuda", budget)
    journal.add(impossible)
    memory = int(torch.cuda.mem_get_info()[0] * 0.9)
    run_jobs(jobs, Settings(seconds=0.5, memory=memory, slow_start=False, until=until), journal)


def frames(journal: Journal, until: float) -> None:
    """Naive N^2 attention and vdcore's over the same video: time, and memory beyond the inputs."""
    from vdcore.testing import TORCH_FORMS

    S, H, D = 256, 16, 64
    ways = {
        "naive": TORCH_FORMS["video_attention"]["naive"],
        "sdpa": TORCH_FORMS["video_attention"]["sdpa"],
        "vdcore[triton]": lambda **kw: vdcore.video_attention(backend="triton", **kw),
        "vdcore[triton], window 8": lambda **kw: vdcore.video_attention(
            backend="triton", mask=FrameMask.window(8), **kw
        ),
    }
    for T in FRAMES:
        q, k, v = (torch.randn(1, T, S, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        for name, attend in ways.items():
            row = replace(
                _base(), op="video_attention", workload="frames", case=f"profile: S {S}, {H} x {D}", x=float(T)
            )
            row = replace(row, provider=name, mode="fwd+bwd")
            if time.monotonic() > until:
                journal.add([replace(row, status="skipped", reason="the time of the run was over")])
                continue
            # Scores, probabilities and their gradients, as the naive form holds them.
            need = 8.0 * H * (T * S) ** 2 if name == "naive" else 0.0
            if need > torch.cuda.mem_get_info()[0]:
                reason = "would not fit"
                row = replace(row, status="predicted", metric="memory", unit="bytes", p50=need, reason=reason)
                journal.add([row])
                continue

            def step(attend: Any = attend, leaves: Any = (q, k, v)) -> None:
                out = attend(q=leaves[0], k=leaves[1], v=leaves[2])
                torch.autograd.grad(out, leaves, out)

            try:
                step()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                peak = float(torch.cuda.max_memory_allocated() - before)
                journal.add([replace(row, metric="memory", unit="bytes", p50=peak, samples=1)])
                journal.add([row.measured(Spread.of(_seconds(step, 5)))])
            except Exception as error:
                journal.add([replace(row, status="failed", reason=first_line(error))])
                torch.cuda.empty_cache()


PARTS = {"ceilings": 60.0, "correctness": 150.0, "contract": 120.0, "frames": 60.0, "benchmarks": SECONDS}


def run_part(name: str, out: Path, shard: int, first: int, until: float) -> None:
    journal = Journal(out / f"{name}-{shard}-{first}.jsonl")
    if name == "correctness":
        correctness(journal, shard, first)
    elif name in ("benchmarks", "frames"):
        {"benchmarks": benchmarks, "frames": frames}[name](journal, until)
    else:
        {"ceilings": ceilings, "contract": contract}[name](journal)


# ---- All of it ----


def _start(name: str, out: Path, seconds: float, shard: int = 0, first: int = 0) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        __file__,
        "--part",
        name,
        "--out",
        str(out),
        "--shard",
        str(shard),
        "--first",
        str(first),
    ]
    log = (out / f"{name}-{shard}-{first}.log").open("wb")
    until = time.monotonic() + max(seconds - 20, 5)
    return subprocess.Popen([*command, "--until", str(until)], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


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


def _collect(out: Path, names: Iterable[str]) -> list[Row]:
    rows = []
    for name in names:
        for path in sorted(out.glob(f"{name}-*-*.jsonl")):
            rows += parse(path.read_text())
            path.unlink()
    return rows


def _print(rows: list[Row], seconds: float) -> None:
    for row in rows:
        if row.op != "ceiling" or not row.p50:
            continue
        rate = (
            f"{row.bytes / row.p50 / 1e9:.0f} GB/s" if row.bytes else f"{(row.flops or 0) / row.p50 / 1e12:.0f} TFLOP/s"
        )
        print(f"{row.provider:8s} {rate}")
    for what, metric in (("correctness", "error"), ("contract", "tests")):
        chosen = [r for r in rows if r.metric == metric]
        bad = [r for r in chosen if r.status == "failed"]
        worst = max((r.error_ratio or 0.0 for r in chosen), default=0.0)
        print(f"{what}: {len(bad)} of {len(chosen)} failed" + (f", worst error ratio {worst:.2f}" if worst else ""))
        for row in bad[:12]:
            print(f"  {row.op} {row.case} {row.dtype}: {row.reason} {row.error_ratio or ''}")
    print("\nmemory and time over frames, forward and backward")
    for row in rows:
        if not curves.is_profile(row) or not row.p50:
            continue
        value = f"{row.p50 / 2**20:10.1f} MiB" if row.unit == "bytes" else f"{row.p50 * 1e3:10.3f} ms"
        print(f"  {int(row.x or 0):4d} frames  {row.provider:26s} {value} {row.reason}")
    print()
    for line in summary.lines(rows):
        print("  ".join(summary.cells(line)))
    for row in (r for r in rows if r.provider == "all" and r.status in ("failed", "skipped")):
        print(f"  {row.op} {row.workload} {row.mode}: {row.status}, {row.reason}")
    print(f"\n{len(rows)} rows in {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", help="parts to run, such as ceilings,benchmarks", default=",".join(PARTS))
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--until", type=float, default=math.inf)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args.part, args.out, args.shard, args.first, args.until)
        return
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: no GPU is visible to torch")
    wanted = args.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        sys.exit(f"bench/gpu.py: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    begin = time.monotonic()
    journal = Journal(args.out / FILE)
    os.environ.setdefault("TRITON_INTERPRET", "0")
    for name in wanted:
        seconds = min(PARTS[name], begin + SECONDS - time.monotonic())
        if seconds < 10:
            journal.add([_trouble(name, None, SECONDS)])
            continue
        if name == "correctness":
            journal.add(_run_correctness(args.out, seconds))
        elif (code := _wait(_start(name, args.out, seconds), seconds)) != 0:
            journal.add([_trouble(name, code, seconds)])
        journal.add(_collect(args.out, [name]))
    journal.close()
    _print(journal.rows, time.monotonic() - begin)


if __name__ == "__main__":
    main()
