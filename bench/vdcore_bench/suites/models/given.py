"""A model of the user's own against frames: as it comes, with naive attention, swapped, and swapped under masks.

A function makes it, for a number of frames::

    def wan(frames):
        return model, {"hidden_states": torch.randn(1, 16, frames, 60, 104), ...}

It returns a module and the keyword arguments of its forward, or in their place a function that calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import PROFILE, Journal, Row, Watch, row_here
from vdcore_bench.measure.memory import Peak, Timed, peak_of, predicted_peak, time_warm
from vdcore_bench.own import own_function
from vdcore_bench.suites.models.calls import call_of
from vdcore_bench.suites.sweep import Estimate, Settings, follow, lacks_gpu, rows_of, without_gpu

OP = "given"
HOST, NAIVE, SWAPPED = "host", "host, naive attention", "vdcore"
MOST_FRAMES = 2**14  # that are looked for: more than any model was trained on


class Made(NamedTuple):
    """A model and a call of it."""

    module: nn.Module
    call: Callable[[], Any]


@dataclass(frozen=True)
class GivenPoint:
    """A model at a number of frames, and who computes its attention.

    Args:
        spec: ``module:function``.
        mask: name of the mask that it is swapped with, of frames alone; empty: none.
        dtype: torch's default one while the function runs.
    """

    spec: str
    provider: str
    frames: int
    mask: str = ""
    mode: str = "fwd"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def make(self) -> Made:
        """
        Raises:
            TypeError: if the function returns something else.
        """
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                torch.manual_seed(0)
                found = own_function(self.spec)(self.frames)
        finally:
            torch.set_default_dtype(usual)
        module, given = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
        if not isinstance(module, nn.Module) or not (isinstance(given, Mapping) or callable(given)):
            expected = "a module and a dict of its forward's arguments, or a function that calls it"
            raise TypeError(f"{self.spec}: must return {expected}, got {found!r:.80}")
        if self.provider == SWAPPED:
            self._swap(module)
        return Made(module, self._call(module, given))

    def _swap(self, module: nn.Module) -> None:
        from vdcore.integrations.diffusers import swap_in
        from vdcore.integrations.mask_names import parse_mask

        swap_in(module, mask=parse_mask(self.mask, (self.frames, 0, 0)) if self.mask else None)

    def _call(self, module: nn.Module, given: Any) -> Callable[[], Any]:
        run = partial(module, **given) if isinstance(given, Mapping) else given
        call = call_of(module, run, self.mode)
        if self.provider != NAIVE:
            return call

        def naive() -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return call()

        return naive

    def row(self) -> Row:
        """Everything but the numbers."""
        return row_here(
            self.device,
            self.dtype,
            op=OP,
            workload=self.spec,
            provider=self.provider,
            variant=self.mask,
            mode=self.mode,
            case=f"{PROFILE}{OP}",
            x=self.frames,
            allocator="torch" if self.device.startswith("cuda") else machine.DEFAULT_THRESHOLDS,
            original={"T": self.frames},
            shape={"T": self.frames},
        )


# ---- What runs ----


@machine.returning_memory()
def measure_memory(point: GivenPoint) -> Peak:
    """Of one call beyond weights and inputs. For a fresh process."""
    call = point.make().call
    call()  # starts threads and loads code
    return peak_of(call, point.device)


def measure_time(point: GivenPoint, need: int) -> Timed:
    """Of warm calls. For a fresh process."""
    return time_warm(point.make().call, point.device, need)


def predict_memory(point: GivenPoint) -> int:
    """Peak bytes of a call beyond weights and inputs, by a run on fake tensors, for a device that is not here too."""
    from torch._subclasses import FakeTensorMode

    if lacks_gpu(point.device):
        point = replace(point, device="cpu")  # a torch without CUDA makes no such tensors, fake ones neither
    with FakeTensorMode():
        made = point.make()
        return predicted_peak(made.module, made.call)


# ---- Rows ----


def points(spec: str, masks: Sequence[str], settings: Settings) -> list[list[GivenPoint]]:
    """One list per curve, in the order of frames. A backward pass is timed with its forward."""
    mode = "fwd+bwd" if "bwd" in settings.mode else "fwd"
    who = [(HOST, ""), (NAIVE, ""), (SWAPPED, ""), *((SWAPPED, mask) for mask in masks)]
    return [
        [
            GivenPoint(spec, provider, n, mask, mode, settings.dtype, settings.device)
            for n in sorted(set(settings.frames))
        ]
        for provider, mask in who
    ]


def profile(spec: str, masks: Sequence[str], settings: Settings, journal: Journal, watch: Watch) -> list[Row]:
    """Memory and time against frames, and how many frames fit."""
    begin = len(journal.rows)
    curves = points(spec, masks, settings)
    with watch.part("A model of your own against frames"):
        follow(
            curves,
            lambda point, rate: measure(point, settings, rate),
            lambda point: point.frames,
            journal,
            lambda p, number, total: watch.step(f"{p.spec}, {name_of(p.row())}, {p.frames} frames", number, total),
            lambda point, rows: watch.done(rows),
        )
    with watch.part("The most frames that fit"):
        for number, curve in enumerate(curves):
            watch.step(f"{spec}, {name_of(curve[0].row())}", number, len(curves))
            rows = [most_frames(curve, settings)]
            journal.add(rows)
            watch.done(rows)
    return journal.rows[begin:]


def measure(point: GivenPoint, settings: Settings, rate: float) -> list[Row]:
    """A memory row and a time row; predicted where the point would not fit the limits, or there is no such device."""
    how = "by a run on fake tensors"
    try:
        need, note = predict_memory(point), ""
    except Exception as error:  # the model's own, or what fake tensors cannot do: a number that is read off a tensor
        need, note = 0, f"not predicted: {type(error).__name__}: {error}"[:200]
    if lacks_gpu(point.device):
        memory, clock = without_gpu(point.row())
        known = replace(memory, status="predicted", p50=float(need), reason=f"{how}; {memory.reason}")
        return [replace(memory, reason=note) if note else known, clock]
    return rows_of(
        point.row(),
        Estimate(need, how, point.frames / rate if rate else 0.0),
        settings,
        partial(measure_memory, point),
        partial(measure_time, point),
        note=note or f"predicted {machine.bytes_text(need)}",
    )


def most_frames(curve: Sequence[GivenPoint], settings: Settings) -> Row:
    """A row with the largest number of frames whose call fits into the memory, by runs on fake tensors.

    Memory grows with frames, so that it is found by halving. Numbers tried are as far apart as those of the curve: a
    model may take multiples of something, or one more.
    """
    point = curve[0]
    limit = settings.memory_limit if lacks_gpu(point.device) else settings.most_memory
    row = replace(point.row(), x=None, metric="frames", unit="frames", case=f"fit into {machine.bytes_text(limit)}")
    first = point.frames
    step = math.gcd(*(p.frames - first for p in curve)) or first

    ends: list[str] = []  # what the model itself says of more frames: that its table of positions ends, say

    def fits(steps: int) -> bool:
        try:
            return predict_memory(replace(point, frames=first + steps * step)) <= limit
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
            return False

    low, high = -1, 0  # steps that fit, and that have not been tried
    while first + high * step <= MOST_FRAMES and fits(high):
        low, high = high, 2 * high + 1
    while high - low > 1 + low // 50:  # within 2 %
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low < 0 and ends:
        return replace(row, status="failed", reason=ends[-1][:300])
    found = float(first + low * step) if low >= 0 else 0.0
    reason = f"more do not run: {ends[-1]}"[:300] if ends else "by runs on fake tensors, within 2 %"
    return replace(row, p50=found, status="predicted", reason=reason)


def name_of(row: Row) -> str:
    """Who computes, and under what mask."""
    return f"{row.provider}, {row.variant}" if row.variant else row.provider


def frames_text(row: Row) -> str:
    """How many fit, or why that is not known."""
    if row.p50 is None:
        return row.reason[:80]
    return f"{row.p50:.0f}" + (f" ({row.reason[:80]})" if row.reason.startswith("more") else "")
