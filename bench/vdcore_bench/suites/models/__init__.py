"""Whole models: a block of a video DiT, VDiTs against frames, diffusers' blocks and steps before and after the swap."""

from __future__ import annotations

from vdcore_bench.jobs.base import DTYPES
from vdcore_bench.measure.journal import Journal, Watch
from vdcore_bench.suites import Options
from vdcore_bench.suites.models import block, given, hosts, steps, vdit
from vdcore_bench.suites.sweep import Settings

TAKES = frozenset({"models", "modes", "dtypes", "batch", "seconds", "rounds", "memory_limit", "full_size", "until"})
PROFILED = tuple(vdit.VARIANTS)
OWN = (block.OP, *PROFILED)  # the models that need no diffusers
FRAMES = (4, 8, 16, 32)


def run(options: Options, journal: Journal, watch: Watch) -> None:
    """The models that the options name; the block and the VDiTs, if they name none."""
    names, dtypes = options.models or OWN, [DTYPES[name] for name in options.dtypes or ("float32",)]
    if block.OP in names:
        block.run(options, journal, watch)
    variants = tuple(name for name in names if name in vdit.VARIANTS)
    if variants:
        with watch.part("Whole models against frames"):
            for mode in options.modes or ("fwd",):
                for dtype in dtypes:
                    limits = Settings(FRAMES, mode=mode, dtype=dtype, device=options.device, memory_limit=options.limit)
                    vdit.run(variants, limits, journal, watch)
    others = [name for name in names if name not in OWN]
    whole = [name for name in others if name.startswith(steps.ALL) or name.endswith(f" {steps.OP}")]
    others = [name for name in others if name not in whole]
    if others:
        with watch.part("Models before and after the swap"):
            for number, name in enumerate(others):
                watch.step(name, number, len(others))
                watch.done(hosts.compare(name, dtypes, options.rounds, journal))
    if whole:
        steps.run(whole, options, journal, watch)


def profile(
    names: tuple[str, ...], settings: Settings, journal: Journal, watch: Watch, masks: tuple[str, ...] = ()
) -> None:
    """VDiTs, blocks of diffusers, and models of the user's own, those under masks too, against frames."""
    own = [name for name in names if ":" in name]
    with watch.part("Whole models against frames"):
        for name in names:
            if name in vdit.VARIANTS:
                vdit.run((name,), settings, journal, watch)
            elif name not in own:
                watch.done(hosts.profile(name, settings, journal, watch.step))
    for name in own:
        given.profile(name, masks, settings, journal, watch)
