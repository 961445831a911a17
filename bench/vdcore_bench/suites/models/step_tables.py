"""Tables and sentences of denoising steps: the time of each, and its parts side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vdcore_bench.measure import machine, parts
from vdcore_bench.measure.journal import Row
from vdcore_bench.suites.models.steps import DECODING, HOST, OP, PART, SWAPPED

COLUMNS = {
    "attention": (parts.ATTENTION,),
    "products": (parts.PRODUCTS,),
    "convolutions": (parts.CONVOLUTIONS,),
    "norms, element by element": (parts.NORMS, parts.ACTIVATIONS, parts.ELEMENTS),
    "copies": (parts.COPIES,),
    "the rest": (parts.REST,),
}
HEADER = ("step", "dtype", "who", "time", "host / it", "peak memory", *COLUMNS)
LEGEND = (
    "One call of a pipeline's model, real width, few layers, random weights. Parts are shares of a call's time under "
    "torch's profiler; they add up to it, and the rest is Python's. Layers are alike, so that shares are those of a "
    "whole model but for what stands around its layers; with the number of tokens attention's share grows."
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
        return ", ".join(filter(None, (self.job.provider, self.job.variant)))

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
                    name,
                    dtype,
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
        under = f", under masks, which change the result, {_range(masked, '{:.2f}')} times" if masked else ""
        said.append(f"Swapped, a step is {_range(plain, '{:.2f}')} times as fast as the host's{under}.")
    if attention:
        around = _range(products, "{:.0f} %")
        said.append(
            f"Attention is {_range(attention, '{:.0f} %')} of the host's time, products and convolutions {around}."
        )
    if decoded:
        said.append(f"Decoding all latents takes as long as {_range(decoded, '{:.1f}')} such steps of few layers.")
    return said


def _positions(group: Sequence[Line]) -> int:
    """Of the latents of a step."""
    return math.prod(next(line.job.shape.values() for line in group if line.job.variant != DECODING))


def _range(found: dict[str, float], form: str) -> str:
    """The least and the largest, with their names."""
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    text = f"{form.format(found[low])} ({low})"
    return text if low == high else f"{text} to {form.format(found[high])} ({high})"
