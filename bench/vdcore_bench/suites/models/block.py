"""A whole V-DiT block, forward and training, against the block as PyTorch users write it on SDPA: time and peak memory.

Both are the same module: the same weights, in vdcore's operators and in torch's. The block is the factorized one: norm,
modulation and QKV projection, spatial attention, the same for temporal attention, text attention, and the MLP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdcore.models import VDiTConfig
from vdcore.models.attention import Context
from vdcore.models.block import Block
from vdcore.testing import error_ratio
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import DTYPES
from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import Journal, Row, Watch
from vdcore_bench.measure.machine import touch_heap
from vdcore_bench.measure.memory import PointError, in_process, peak_of
from vdcore_bench.measure.timing import Contender, Spread, clock_for, race_within
from vdcore_bench.report.summary import time_of
from vdcore_bench.suites import Options
from vdcore_bench.suites.runner import blank, first_line, row_of, too_large
from vdcore_bench.workloads import Budget, Shape, load, scaled

OP, WORKLOAD = "vdit_block", "latte-1-512"
MODES = ("fwd", "fwd+bwd")
JUDGED_ROWS = 1  # rows of tokens at which outputs and gradients are compared with float64
CALLS = 24.0  # budgets of one operator's call that a block's forward takes: a second or two on a CPU


@dataclass(frozen=True)
class BlockJob:
    """A block on a workload's shape.

    Args:
        original: the workload's shape, before it was cut to the machine.
    """

    original: Shape
    shape: Shape
    mode: str = "fwd"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def trains(self) -> bool:
        return "bwd" in self.mode

    def flops(self) -> float:
        """Of all products; backward takes twice the projections' and 2.5 times the attentions'."""
        s, C = self.shape, self.shape.H * self.shape.D
        tokens = s.B * s.T * s.S
        # spatial and temporal 4 each, the text's 2, the MLP 8
        projections = 2.0 * tokens * C * C * 18 + 4.0 * s.B * s.L * C * C
        attention = 4.0 * tokens * C * (s.S + s.T + s.L)
        return projections * (3 if self.trains else 1) + attention * (3.5 if self.trains else 1)

    def need(self) -> int:
        """Bytes of activations at most: the MLP's hidden channels, and what training keeps."""
        s = self.shape
        return s.B * s.T * s.S * s.H * s.D * self.dtype.itemsize * (36 if self.trains else 16)

    def row(self) -> Row:
        like = make(
            "modulate", load()[WORKLOAD], mode=self.mode, dtype=self.dtype, device=self.device, shape=self.shape
        )
        base = blank(replace(like, original=self.original))
        return replace(base, op=OP, case="spatial + temporal + text + MLP", flops=self.flops(), bytes=None)


def jobs(modes: Sequence[str], dtypes: Sequence[str], device: str, budget: Budget, batch: int = 1) -> list[BlockJob]:
    """One per mode and dtype, of one shape: Latte-1's, with rows of tokens left out until a call fits the budget."""
    original = load()[WORKLOAD].shape(batch)

    def fits(shape: Shape) -> bool:
        return BlockJob(original, shape).flops() <= budget.flops * CALLS

    shape = scaled(original, ("rows",), fits)
    found = dict.fromkeys("fwd+bwd" if "bwd" in mode else mode for mode in modes)  # backward alone is not measured
    return [BlockJob(original, shape, mode, DTYPES[dtype], device) for dtype in dtypes for mode in found]


# ---- The block, and the inputs ----


@dataclass
class Inputs:
    """x ``(B, T, S, C)``, condition ``(B, C)``, text ``(B, L, C)``, and the gradient of the result."""

    block: Block
    x: Tensor
    condition: Tensor
    text: Tensor
    dout: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.condition, self.text, *self.block.parameters()]

    def context(self) -> Context:
        s = self.x.shape
        grid = (s[1], 1, s[2])
        return Context(grid=grid, condition=self.condition, activated=F.silu(self.condition), text=self.text)

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy."""
        layers: Any = self.block.layers
        block = Block(_config(layers["spatial"].heads, self.x.shape[-1]), PARTS)
        block.load_state_dict(self.block.state_dict())

        def copy(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        block.to(self.x.device, dtype)
        return Inputs(block, copy(self.x), copy(self.condition), copy(self.text), self.dout.to(dtype))


PARTS = ("spatial", "temporal", "cross", "mlp")


def _config(heads: int, width: int) -> VDiTConfig:
    return VDiTConfig(width=width, heads=heads, depth=1, attention="factorized", text_width=width)


def inputs(job: BlockJob, rows: int | None = None) -> Inputs:
    """Drawn at random; weights as large as keep activations near 1."""
    s = job.shape if rows is None else replace(job.shape, rows=rows)
    C = s.H * s.D
    torch.manual_seed(0)
    with torch.device(job.device):
        block = Block(_config(s.H, C), PARTS)
        for p in block.parameters():
            nn.init.normal_(p, std=p.shape[1] ** -0.5 if p.ndim == 2 else 0.1)
        block = block.to(job.dtype)
        x, c, text, dout = (
            torch.randn(n, dtype=job.dtype) for n in ((s.B, s.T, s.S, C), (s.B, C), (s.B, s.L, C), (s.B, s.T, s.S, C))
        )
    for t in (x, c, text):
        t.requires_grad_(job.trains)
    return Inputs(block, x, c, text, dout)


# ---- How PyTorch users write it ----


def eager(given: Inputs, permuted: bool = False) -> Tensor:
    """The block on SDPA, with views where SDPA takes them.

    Args:
        permuted: tokens are brought to ``(B, S, T, C)`` for temporal attention and back, as models do; else its
            queries, keys and values are strided views.
    """
    block, x, text = given.block, given.x, given.text
    B, T, S, C = x.shape
    layers: Any = block.layers
    heads = layers["spatial"].heads
    rows = block.modulation(given.context())[:, :, None, None].unbind(1)  # (B, 1, 1, C) each

    def norm(x: Tensor, i: int) -> Tensor:
        return torch.addcmul(rows[i], F.layer_norm(x, (C,), eps=1e-6), 1 + rows[i + 1])

    y = layers["spatial"].qkv(norm(x, 0)).view(B * T, S, 3, heads, -1)
    q, k, v = y.permute(2, 0, 3, 1, 4)  # (B*T, H, S, D)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, S, C)
    x = torch.addcmul(x, rows[2], layers["spatial"].proj(y))

    y = norm(x, 3)
    if permuted:
        y = layers["temporal"].qkv(y.transpose(1, 2).reshape(B * S, T, C)).view(B * S, T, 3, heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)  # (B*S, H, T, D)
        y = layers["temporal"].proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, T, C))
        y = y.transpose(1, 2)
    else:
        y = layers["temporal"].qkv(y).view(B, T, S, 3, heads, -1)
        q, k, v = (z.flatten(0, 1) for z in y.permute(3, 0, 2, 4, 1, 5))  # (B*S, H, T, D), views for one video
        y = F.scaled_dot_product_attention(q, k, v).unflatten(0, (B, S)).permute(0, 3, 1, 2, 4)
        y = layers["temporal"].proj(y.reshape(B, T, S, C))
    x = torch.addcmul(x, rows[5], y)

    cross = layers["cross"]
    q = cross.q(x).view(B, T * S, heads, -1).transpose(1, 2)
    k, v = cross.kv(text).view(B, text.shape[1], 2, heads, -1).permute(2, 0, 3, 1, 4)
    x = x + cross.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, S, C))

    y = layers["mlp"].proj(F.gelu(layers["mlp"].up(norm(x, 6)), approximate="tanh"))
    return torch.addcmul(x, rows[8], y)


# (provider, variant) -> the function; compiled when it is measured.
PROVIDERS: dict[tuple[str, str], Callable[[Inputs], Tensor]] = {
    ("vdcore", "auto"): lambda given: given.block(given.x, given.context()),
    ("eager[sdpa]", "views"): eager,
    ("eager[sdpa]", "permuted"): lambda given: eager(given, permuted=True),
    ("eager[compiled]", "views"): eager,
}
PEERS = ("eager", "eager[sdpa]", "eager[compiled]")
PLAIN = tuple(name for name in PROVIDERS if name[0] != "eager[compiled]")


def chosen(peers: frozenset[str]) -> list[tuple[str, str]]:
    """The providers of these names, vdcore among them; all if there are none."""
    names = [*peers, "vdcore"]
    return [key for key in PROVIDERS if not peers or key[0] in names or key[0].partition("[")[0] in names]


def function_of(provider: str, variant: str) -> Callable[[Inputs], Tensor]:
    function = PROVIDERS[provider, variant]
    return torch.compile(function) if provider == "eager[compiled]" else function


# ---- Measuring ----


def step(job: BlockJob, given: Inputs, function: Callable[[Inputs], Tensor], _: Any = None) -> list[Tensor]:
    """The result, and in training the gradients of everything."""
    with torch.set_grad_enabled(job.trains):
        out = function(given)
    found = torch.autograd.grad(out, given.leaves, given.dout) if job.trains else ()
    return [out.detach(), *found]


def judge(job: BlockJob) -> dict[tuple[str, str], float]:
    """Every provider's worst error ratio over outputs and gradients, on few tokens per frame, against float64."""
    given = inputs(job, JUDGED_ROWS)
    exact = step(job, given.to(torch.float64), eager)
    plain = [step(job, given, PROVIDERS[name]) for name in PLAIN if name[0] != "vdcore"]
    found = {}
    for provider in PLAIN:
        results = step(job, given, PROVIDERS[provider])
        ratios = [
            error_ratio(y, e, [p[i] for p in plain], gradient=i > 0).worst
            for i, (y, e) in enumerate(zip(results, exact))
        ]
        found[provider] = max(ratios)
    return found


@machine.returning_memory()
def measure_memory(job: BlockJob, provider: str, variant: str) -> int:
    """Peak bytes of one call beyond weights and inputs, gradients included. For a fresh process."""
    function = function_of(provider, variant)
    step(job, inputs(job, 1), function)  # starts threads and loads code
    given = inputs(job)
    if provider == "eager[compiled]":
        step(job, given, function)
    return peak_of(lambda: step(job, given, function), job.device).bytes


def run(options: Options, journal: Journal, watch: Watch) -> None:
    """The block in every mode and dtype that the options name."""
    modes, dtypes = options.modes or MODES, options.dtypes or ("float32",)
    with watch.part("A V-DiT block"):
        measure(jobs(modes, dtypes, options.device, options.budget, options.batch), options, journal, watch)


def measure(wanted: Sequence[BlockJob], options: Options, journal: Journal, watch: Watch) -> None:
    """Time and memory rows of every job; few rounds are run in any case."""
    providers = chosen(options.peers.intersection(PEERS))
    for number, job in enumerate(wanted):
        base, begin = job.row(), len(journal.rows)
        watch.step(f"{OP} {job.mode}", number, len(wanted))
        if job.device.startswith("cuda") and not torch.cuda.is_available():
            journal.add([replace(base, provider="all", status="skipped", reason="no GPU is visible to torch")])
            continue
        if job.need() > options.limit:
            journal.add([row_of(base, too_large("all", job.need(), options.limit))])
            continue
        journal.add(_memory_rows(job, base, providers, watch))
        journal.add(_time_rows(job, base, providers, options, watch))
        watch.done(journal.rows[begin:])


def _memory_rows(job: BlockJob, base: Row, providers: Sequence[tuple[str, str]], watch: Watch) -> list[Row]:
    rows = []
    for provider, variant in providers:
        watch.doing(f"memory of {provider} {variant}")
        row = replace(base, provider=provider, variant=variant, metric="memory", unit="bytes")
        try:
            peak = float(in_process(measure_memory, job, provider, variant))
            rows.append(row.measured(Spread.of([peak]), allocator=machine.DEFAULT_THRESHOLDS))
        except PointError as error:
            rows.append(replace(row, status="failed", reason=str(error)[:300]))
    return rows


def _time_rows(
    job: BlockJob, base: Row, providers: Sequence[tuple[str, str]], options: Options, watch: Watch
) -> list[Row]:
    watch.doing("errors")
    ratios = judge(job)
    if job.device == "cpu":
        touch_heap(2 * job.need())
        base = job.row()  # it names the heap
    given, clock = inputs(job), clock_for(job.device)
    racing: dict[tuple[str, str], Contender] = {}
    rows = []
    for name in providers:
        watch.doing(" ".join(name))
        try:
            contender = Contender(partial(step, job, given, function_of(*name)))
            begin = time.perf_counter()
            contender.run(clock)
            first = time.perf_counter() - begin
            contender.estimate = first if first > options.seconds and name in PLAIN else contender.run(clock).seconds
            racing[name] = contender
        except Exception as error:
            rows.append(replace(base, provider=name[0], variant=name[1], status="failed", reason=first_line(error)))
    watch.doing("rounds")
    ours = frozenset(" ".join(name) for name in racing if name[0] == "vdcore")
    race_within({" ".join(name): c for name, c in racing.items()}, options.seconds, options.rounds, clock, ours=ours)
    for name, contender in racing.items():
        note = f"error taken at {JUDGED_ROWS * job.shape.columns} tokens per frame" if name in ratios else ""
        row = replace(base, provider=name[0], variant=name[1], error_ratio=ratios.get(name), reason=note)
        rows.append(row.measured(contender.spread))
    return rows


# ---- Tables ----

HEADER = ("block", "mode", "dtype", "vdcore", "eager", "speed-up", "memory: vdcore", "eager", "ratio", "error")


def _over(theirs: Row, ours: Row) -> str:
    assert theirs.p50 and ours.p50
    return f"{theirs.p50 / ours.p50:.2f}x"


def cells(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line per job: vdcore beside the fastest eager form, and the one that takes the least memory."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.op == OP and row.status == "ok" and row.p50:
            found.setdefault((row.scaling or str(row.shape), row.mode, row.dtype, row.device), []).append(row)
    lines = []
    for (shape, mode, dtype, _), group in found.items():
        best = {}
        for metric in ("time", "memory"):
            of = sorted((r for r in group if r.metric == metric), key=lambda r: r.p50 or 0.0)
            ours, theirs = ([r for r in of if (r.provider == "vdcore") == mine][:1] for mine in (True, False))
            best[metric] = (*ours, *theirs) if ours and theirs else ()
        if not best["time"]:
            continue
        a, b = best["time"]
        line = [shape, mode, dtype, time_of(a, spread=True), f"{time_of(b, spread=True)} {b.provider} {b.variant}"]
        line.append(_over(b, a))
        if best["memory"]:
            c, d = best["memory"]
            line += [machine.bytes_text(c.p50 or 0.0), machine.bytes_text(d.p50 or 0.0), _over(d, c)]
        else:
            line += [""] * 3
        lines.append((*line, "" if a.error_ratio is None else f"{a.error_ratio:.2f}"))
    return lines
