"""``vdcore profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vdcore.cli import options
from vdcore.cli.options import several, split


def profile(
    workload: options.WORKLOAD = None,
    model: Annotated[
        list[str] | None,
        several(
            "Instead: VDiT variants, blocks of diffusers, or module:function, which gets the number of frames and "
            "returns your model and the arguments of its forward, or a function that calls it."
        ),
    ] = None,
    mask: Annotated[list[str] | None, several("With module:function: also swapped with these, such as causal.")] = None,
    frames: Annotated[str | None, typer.Option(help="Numbers of frames, such as 8,16,32.")] = None,
    attention: Annotated[list[str] | None, several("naive, sdpa, vdcore.")] = None,
    mode: Annotated[str, typer.Option(help="fwd, bwd or fwd+bwd.")] = "fwd",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: options.DEVICE = None,
    threads: options.THREADS = None,
    memory_limit: Annotated[str | None, typer.Option(help="Such as 8GiB; default: what is available.")] = None,
    time_limit: Annotated[float, typer.Option(min=0, help="Seconds of one call; what takes longer is predicted.")] = 20,
    ranks: Annotated[str | None, typer.Option(help="Processes that share a VDiT's frames, such as 1,2,4.")] = None,
    plan: Annotated[str | None, typer.Option(help="With --ranks: switch, halo, heads or ring.")] = None,
    link: Annotated[
        float | None, typer.Option(min=0.001, help="With --ranks: GB/s a rank sends, to predict for.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, plots and report.html.")] = Path("out/profile"),
) -> None:
    """Peak memory and time against frames; a point that would not fit is predicted, and says what it would need."""
    from vdcore_bench import workloads
    from vdcore_bench.jobs.base import DTYPES, MODES
    from vdcore_bench.suites import Options, memory, models, sweep

    if ranks is not None:
        return _on_ranks(ranks, model, frames, mode, dtype, plan, link, out)
    own = tuple(name for name in split(model) if ":" in name)
    model = [name for name in split(model) if name not in own]
    masks = _masks(mask, own)
    names = options.known("--workload", workload, workloads.load())
    device = options.device_named(device)
    (mode,) = options.known("--mode", [mode], MODES)
    (dtype,) = options.known("--dtype", [dtype], DTYPES)
    limit = None if memory_limit is None else options.parse_bytes("--memory-limit", memory_limit)
    settings: dict[str, Any] = {
        "frames": _numbers("--frames", frames) or sweep.FRAMES,
        "attentions": options.known("--attention", attention, memory.ATTENTIONS) or memory.ATTENTIONS,
        "mode": mode,
        "dtype": DTYPES[dtype],
        "time_limit": time_limit,
    }
    whole = options.models_named(model, device, blocks_alone=True)
    if set(whole) - set(models.PROFILED) and mode != "fwd":
        raise typer.BadParameter("blocks of diffusers are profiled forward", param_hint="--mode")
    if own and attention is not None:
        raise typer.BadParameter("it is of workloads and VDiT variants", param_hint="--attention")
    if sweep.lacks_gpu(device) and own and limit is None:
        raise typer.BadParameter("it is needed where there is no such device", param_hint="--memory-limit")
    given = Options(device=device, memory_limit=limit)
    options.prepare(device, threads)
    if whole or own:
        limits = sweep.Settings(device=device, memory_limit=given.limit, **settings)
        options.record(out, lambda journal, watch: models.profile((*whole, *own), limits, journal, watch, masks))
    else:
        options.record(out, lambda journal, watch: memory.profile(names, given, journal, watch, **settings))


def _masks(given: list[str] | None, models: tuple[str, ...]) -> tuple[str, ...]:
    """Names of masks that do not depend on rows and columns, which the call of a model decides."""
    from vdcore.integrations.mask_names import parse_mask
    from vdcore_bench.own import own_function

    names = split(given)
    if names and not models:
        raise typer.BadParameter("it goes with --model module:function", param_hint="--mask")
    try:
        for name in names:
            parse_mask(name, (8, 8, 8))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--mask") from None
    if any(name.startswith("radial") for name in names):
        raise typer.BadParameter("radial: its rows and columns are not known before a call", param_hint="--mask")
    try:
        for name in models:
            own_function(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    return names


def _on_ranks(
    given: str,
    model: list[str] | None,
    frames: str | None,
    mode: str,
    dtype: str,
    plan: str | None,
    link: float | None,
    out: Path,
) -> None:
    """VDiTs whose frames several processes of this machine share, over gloo."""
    from vdcore.models.vdit import ways
    from vdcore_bench.jobs.base import DTYPES, MODES
    from vdcore_bench.suites import ranks
    from vdcore_bench.suites.models.vdit import VARIANTS

    (mode,), (dtype,) = options.known("--mode", [mode], MODES), options.known("--dtype", [dtype], DTYPES)
    variants = options.known("--model", model, VARIANTS) or tuple(VARIANTS)
    for name in variants if plan is not None else ():
        options.known("--plan", [plan or ""], ways(VARIANTS[name]))
    settings = ranks.Settings(
        ranks=_numbers("--ranks", given) or (),
        frames=_numbers("--frames", frames) or (16,),
        mode=mode,
        dtype=DTYPES[dtype],
        plan=plan,
        link=None if link is None else link * 1e9,
    )
    options.record(out, lambda journal, watch: ranks.run(variants, settings, journal, watch))


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    numbers = [int(n) if n.isdecimal() else 0 for n in split([text])]
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r}: not numbers such as 8,16,32", param_hint=option)
    return tuple(sorted(set(numbers)))
