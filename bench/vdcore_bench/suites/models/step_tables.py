"""Tables and sentences of denoising steps: the time of each, and its parts side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vdcore_bench.measure import machine, parts
from vdcore_bench.measure.journal import Row, text_of
from vdcore_bench.report.plot import BEST, NAIVE, OURS, THIRD, new_plot, png
from vdcore_bench.report.summary import between
from vdcore_bench.suites.models.steps import DECODING, HOST, OP, PART, SWAPPED

COLUMNS = {
    "attention": (parts.ATTENTION,),
    "products": (parts.PRODUCTS,),
    "convolutions": (parts.CONVOLUTIONS,),
    "norms, elementwise": (parts.NORMS, parts.ACTIVATIONS, parts.ELEMENTS),
    "copies": (parts.COPIES,),
    "the rest": (parts.REST,),
}
HEADER = ("step", "who", "time", "host / it", "memory", *COLUMNS)
LEGEND = (
    "One call of a pipeline's model: real width, few layers, random weights; its peak memory beyond them. Parts are "
    "shares of a call's time under torch's profiler; they add up to it, and the rest is Python's. Layers are alike, so "
    "that shares are those of a whole model but for what stands around its layers; with the number of tokens "
    "attention's share grows."
)
NOTES = ("step", "who", "what ran", "what to know")


@dataclass
class Line:
    """The rows of one call: by metric."""

    job: Row
    metrics: dict[str, Row] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        return self.metrics["time"].p50 if "time" in self.metrics else None

    def share(self, column: str) -> float | None:
        """Of a call's time."""
        times = {name[len(PART) :]: row.p50 or 0.0 for name, row in self.metrics.items() if name.startswith(PART)}
        total = sum(times.values())
        return sum(times.get(name, 0.0) for name in COLUMNS[column]) / total if total else None

    @property
    def who(self) -> str:
        return DECODING if self.job.variant == DECODING else text_of(self.job.provider, self.job.variant)

    @property
    def reason(self) -> str:
        return next((row.reason for row in self.metrics.values() if row.reason), self.job.reason)


def lines(rows: Sequence[Row]) -> dict[tuple[str, str, int], list[Line]]:
    """By step, dtype and threads: the host's call, ours, ours under the mask, the decoding."""
    found: dict[tuple[str, str, int], dict[tuple[str, str], Line]] = {}
    for row in rows:
        if row.op == OP:
            group = found.setdefault((row.workload, row.dtype, row.threads), {})
            group.setdefault((row.provider, row.variant), Line(row)).metrics[row.metric] = row
    return {key: list(group.values()) for key, group in found.items()}


def _seconds_of(group: Sequence[Line], provider: str, variant: str = "") -> float | None:
    return next((x.seconds for x in group if (x.job.provider, x.job.variant) == (provider, variant)), None)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Table rows as :data:`HEADER` names them, of what was measured."""
    made: list[tuple[str, ...]] = []
    for (name, dtype, _), group in lines(rows).items():
        host = _seconds_of(group, HOST)
        for line in group:
            if line.job.status != "ok":
                continue
            seconds, memory = line.seconds, line.metrics.get("memory")
            raced = line.job.variant != DECODING and host and seconds
            shares = [line.share(column) for column in COLUMNS]
            made.append(
                (
                    f"{name}, {dtype}",
                    line.who,
                    machine.seconds_text(seconds) if seconds else "-",
                    f"{host / seconds:.2f}x" if raced and host and seconds else "-",
                    machine.bytes_text(memory.p50) if memory and memory.p50 is not None else "-",
                    *("-" if share is None else f"{100 * share:.0f} %" for share in shares),
                )
            )
    return made


def notes(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Table rows as :data:`NOTES` names them."""
    return [
        (name, line.who, line.job.scaling, line.reason) for (name, *_), group in lines(rows).items() for line in group
    ]


def picture(rows: Sequence[Row]) -> bytes | None:
    """Every call as a bar of its parts, in shares; None without rows."""
    named = [
        (name, line)
        for (name, *_), group in lines(rows).items()
        for line in group
        if line.share("attention") is not None
    ]
    if not named:
        return None
    figure, axes = new_plot(10.0, 1.2 + 0.32 * len(named))
    axis, left = axes[0][0], [0.0] * len(named)
    for color, column in zip((OURS, BEST, THIRD, "#8c6bb1", NAIVE, "#d0d0d0"), COLUMNS):
        shares = [100 * (line.share(column) or 0.0) for _, line in named]
        axis.barh(range(len(named)), shares, left=left, color=color, label=column)
        left = [a + b for a, b in zip(left, shares)]
    axis.set_yticks(range(len(named)), [f"{name}: {line.who}" for name, line in named], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of a call's time")
    figure.legend(loc="outside upper center", ncols=len(COLUMNS), fontsize=8, frameon=False)
    return png(figure)


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the swap wins of a step, what part attention is, and what decoding takes beside it."""
    plain, masked, decoded = dict[str, float](), dict[str, float](), dict[str, float]()
    attention, products = dict[str, float](), dict[str, float]()
    for (name, *_), group in lines(rows).items():
        host = _seconds_of(group, HOST)
        for line in group:
            if not host or not line.seconds:
                continue
            if line.job.variant == DECODING:
                decoded[name] = line.seconds / math.prod(line.job.shape.values()) * _positions(group) / host
            elif line.job.provider == SWAPPED:
                (masked if line.job.variant else plain)[name] = host / line.seconds
            else:
                attention[name] = 100 * (line.share("attention") or 0.0)
                products[name] = 100 * ((line.share("products") or 0.0) + (line.share("convolutions") or 0.0))
    said = []
    if plain:
        under = f", under masks, which change the result, {between(masked, '{:.2f}')} times" if masked else ""
        said.append(f"Swapped, a step is {between(plain, '{:.2f}')} times as fast as the host's{under}.")
    if attention:
        around = between(products, "{:.0f} %")
        said.append(
            f"Attention is {between(attention, '{:.0f} %')} of the host's time, products and convolutions {around}."
        )
    if decoded:
        said.append(f"Decoding all latents takes as long as {between(decoded, '{:.1f}')} such steps of few layers.")
    return said


def _positions(group: Sequence[Line]) -> int:
    """Of the latents of a step."""
    return math.prod(next(line.job.shape.values() for line in group if line.job.variant != DECODING))
