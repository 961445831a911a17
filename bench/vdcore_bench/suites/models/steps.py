"""A denoising step of whole pipelines: as diffusers computes it, swapped, and swapped under a mask; and the decoding.

Time and peak memory of each, and what the time goes to: what part of a step attention is at all. Widths are real,
layers few, weights random. A mask changes the result, and its rows say by how much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdcore import FrameMask
from vdcore_bench.jobs.base import DTYPES
from vdcore_bench.measure import machine, parts
from vdcore_bench.measure.journal import Journal, Row, Watch, row_here, text_of
from vdcore_bench.measure.memory import peak_of, predicted_peak
from vdcore_bench.measure.timing import FEWEST_BEHIND, Contender, Spread, clock_for, race
from vdcore_bench.suites import Options
from vdcore_bench.suites.models.calls import call_of, first_tensor
from vdcore_bench.suites.runner import first_line, row_of, too_large

if TYPE_CHECKING:
    from vdcore_bench.suites.models.pipelines import Pipeline, Size

OP, ALL = "step", "steps"
HOST, SWAPPED, DECODING = "diffusers", "vdcore", "VAE decode"
PART = "part: "  # how the metric of a row begins that has one part of a call's time
CALLS = ((HOST, False), (SWAPPED, False), (SWAPPED, True))  # who, and whether under the mask


def names() -> list[str]:
    """What may be asked for: all of them, or one."""
    from vdcore_bench.suites.models.pipelines import PIPELINES

    return [ALL, *PIPELINES]


@dataclass(frozen=True)
class Step:
    """A pipeline's step in a dtype.

    Args:
        full: at the pipeline's default size, and not at that of a small machine.
    """

    name: str
    dtype: torch.dtype = torch.float32
    full: bool = False

    @property
    def pipeline(self) -> Pipeline:
        from vdcore_bench.suites.models.pipelines import PIPELINES

        return PIPELINES[self.name]

    @property
    def size(self) -> Size:
        return self.pipeline.size if self.full else self.pipeline.small

    @property
    def decoded(self) -> Size:
        """What is decoded: on a small machine a part of the same latents."""
        return self.size if self.full else self.pipeline.decoded

    @property
    def mask(self) -> FrameMask:
        return FrameMask.symmetric(self.pipeline.mask)

    def drawn(self, make: Callable[..., dict[str, Any]], size: Size) -> dict[str, Any]:
        """Inputs of a size in the dtype."""
        torch.manual_seed(0)
        given = make(*size)
        return {name: _cast(x, self.dtype) for name, x in given.items()}

    def made(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module in the dtype."""
        torch.manual_seed(0)
        module = make().eval()
        return module if self.dtype == torch.float32 else nn.Module.to(module, self.dtype)

    def row(self) -> Row:
        """Everything but who it is of, and the numbers."""
        original = self.pipeline.size
        cut = " x ".join(map(str, self.size))
        cut = cut if self.full else f"{' x '.join(map(str, original))} -> {cut}"
        return row_here(
            "cpu",
            self.dtype,
            op=OP,
            workload=self.name,
            provider="",
            mode="fwd",
            case="real width, random weights",
            original=dict(zip("THW", original)),
            shape=dict(zip("THW", self.size)),
            scaling=f"latents {cut}, {self.pipeline.layers}",
        )


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


@dataclass
class Racer:
    """One of those that compute a step."""

    row: Row
    call: Callable[[], Any]
    contender: Contender = field(init=False)

    def __post_init__(self) -> None:
        self.contender = Contender(lambda _: self.call())


def racers(step: Step) -> Iterator[Racer]:
    """The host, then the swapped model, then that under the mask: on the same weights, which lie in memory once.

    Each has made one call when the next one is built; rows of those that are swapped say how far it is from the host's.
    """
    from vdcore.integrations.diffusers import swap_in

    model = step.made(step.pipeline.model)
    given = step.drawn(step.pipeline.inputs, step.size)
    weights = {id(x): x for x in (*model.parameters(), *model.buffers())}
    expected = torch.empty(0)
    for provider, masked in CALLS:
        its = model if provider == HOST else copy.deepcopy(model, dict(weights))
        if provider != HOST:
            swap_in(its, mask=step.mask if masked else None)
        call = call_of(its, partial(its, **given), "fwd")
        result = first_tensor(call())
        if provider == HOST:
            expected, note = result, attention_share(step)
        else:
            change = ((result - expected).abs().max() / expected.abs().max()).item()
            note = f"differs from the host's by {change:.0e} of the largest value"
        if masked:
            density = f"{100 * step.mask.density(step.size[0]):.0f} % of the pairs of frames"
            near = f"{step.pipeline.mask} frames to either side are visible, {density}"
            note = f"the mask changes the result: {note}; {near}"
        row = replace(step.row(), provider=provider, variant=_mask_text(step) if masked else "", reason=note)
        yield Racer(row, call)


def _mask_text(step: Step) -> str:
    return f"frames:{step.pipeline.mask}"  # as command lines name it


# ---- Counting ----


def attention_share(step: Step) -> str:
    """What part of the operations of a step attention is, at this size and at the pipeline's own, by counting."""
    text = f"attention is {counted_share(step):.0%} of the operations"
    return text if step.full else f"{text}, {counted_share(replace(step, full=True)):.0%} at the pipeline's own size"


def counted_share(step: Step) -> float:
    """Operations of attention's products over those of all products and convolutions, on fake tensors."""
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    step = replace(step, dtype=torch.float32)
    with FakeTensorMode():
        model, given = step.made(step.pipeline.model), step.drawn(step.pipeline.inputs, step.size)
        # As products of matrices, which the counter knows. Nothing else in these models is a batched product.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call_of(model, partial(model, **given), "fwd")()
    found = counter.get_flop_counts()["Global"]
    return found.get(torch.ops.aten.bmm, 0) / sum(found.values())


def predicted_need(step: Step) -> tuple[int, int]:
    """Bytes of weights, and of a host's call beyond them, by a run on fake tensors."""
    from torch._subclasses import FakeTensorMode

    plain = replace(step, dtype=torch.float32)  # fake modules cannot be cast
    with FakeTensorMode():
        model = plain.made(plain.pipeline.model)
        call = call_of(model, partial(model, **plain.drawn(plain.pipeline.inputs, plain.size)), "fwd")
        found = sum(p.nbytes for p in model.parameters()), predicted_peak(model, call)
    weights, peak = (size * step.dtype.itemsize // torch.float32.itemsize for size in found)
    return weights, peak


# ---- Measuring ----


def run(chosen: Sequence[str], options: Options, journal: Journal, watch: Watch) -> None:
    """Steps of these names in every dtype of the options."""
    wanted = names()[1:] if ALL in chosen else list(dict.fromkeys(chosen))
    dtypes = [DTYPES[name] for name in options.dtypes or ("float32",)]
    steps = [Step(name, dtype, options.full_size) for name in wanted for dtype in dtypes]
    with watch.part("A denoising step"):
        for number, step in enumerate(steps):
            watch.step(step.name, number, len(steps))
            begin = len(journal.rows)
            weights, peak = predicted_need(step)
            if weights + peak > options.limit:
                journal.add([row_of(step.row(), too_large("all", weights + peak, options.limit))])
            else:
                try:
                    measure(step, peak, options, journal, watch)
                    measure_decoding(step, journal, watch)
                except Exception as error:  # the host's own
                    journal.add([replace(step.row(), provider="all", status="failed", reason=first_line(error))])
            watch.done(journal.rows[begin:])


def measure(step: Step, need: int, options: Options, journal: Journal, watch: Watch) -> None:
    """Rows of memory and of the parts of the time of each, as soon as there are any; then the race.

    If it is interrupted, its rows are of the rounds that were run.

    Args:
        need: bytes of a call.
    """
    racing: list[Racer] = []
    watch.doing("building")
    for racer in racers(step):
        name = " ".join(filter(None, (racer.row.provider, racer.row.variant)))
        watch.doing(f"memory and parts of {name}")
        journal.add([_memory_row(racer)])
        found = parts.breakdown(racer.call, rounds=1, warm=True)
        journal.add(_part_rows(racer.row, found))
        racer.contender.estimate = found.total / 1000
        racing.append(racer)
        watch.doing("building")
    watch.doing("rounds")
    clock = clock_for("cpu")
    machine.touch_heap(min(2 * need, machine.memory_limit()))
    by_name = {str(i): racer.contender for i, racer in enumerate(racing)}
    affordable = int(options.seconds / sum(contender.estimate for contender in by_name.values()))
    rounds = max(FEWEST_BEHIND, min(options.rounds, affordable))
    try:
        race(by_name, dict.fromkeys(by_name, rounds), clock, options.until)
    finally:
        timed = [racer for racer in racing if racer.contender.samples]
        journal.add(replace(r.row, allocator=machine.heap()).measured(r.contender.spread) for r in timed)


def _memory_row(racer: Racer) -> Row:
    peak = float(peak_of(racer.call).bytes)
    return replace(racer.row, metric="memory", unit="bytes", allocator=machine.DEFAULT_THRESHOLDS).measured(
        Spread.of([peak])
    )


def _part_rows(row: Row, found: parts.Breakdown) -> list[Row]:
    """Seconds of every part of one call under the profiler; they add up to it."""
    return [replace(row, metric=f"{PART}{name}").measured(Spread.of([ms / 1000])) for name, ms in found.groups.items()]


def measure_decoding(step: Step, journal: Journal, watch: Watch) -> None:
    """Time and memory of the autoencoder, which no swap changes, on a part of the step's latents."""
    from vdcore_bench.suites.models.pipelines import decode

    watch.doing(DECODING)
    autoencoder = step.made(step.pipeline.autoencoder)
    given = step.drawn(step.pipeline.latents, step.decoded)
    call = call_of(autoencoder, partial(decode, autoencoder, given), "fwd")
    part = "" if step.full else f"{' x '.join(map(str, step.decoded))} of them decoded"
    row = replace(step.row(), provider=HOST, variant=DECODING, shape=dict(zip("THW", step.decoded)))
    row = replace(row, scaling=text_of(row.scaling.split(",")[0], part))
    found: list[parts.Breakdown] = []
    # One call says all: it takes seconds to minutes, beside which what a first call takes more is nothing.
    peak = peak_of(lambda: found.append(parts.breakdown(call, rounds=1, warm=True)))
    journal.add([replace(row, metric="memory", unit="bytes").measured(Spread.of([float(peak.bytes)]))])
    journal.add(_part_rows(row, found[0]))
    journal.add([row.measured(Spread.of([found[0].total / 1000]), reason="one call, under the profiler")])
