"""``vdcore masks``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vdcore.cli import options
from vdcore.cli.options import several
from vdcore.cli.shared import TRAIN_OUT, plain_errors

RANDOM = "vdit-full"  # the model that is there without training
LEVELS = (0.9, 0.5, 0.1)


def masks(
    model: Annotated[
        str,
        typer.Option(
            help=f"What vdcore train left (a file or its folder), module:function, or {RANDOM}, which is untrained. "
            "The function returns a model or pipeline, and the arguments of its forward or a function that calls it."
        ),
    ] = str(TRAIN_OUT),
    mask: Annotated[
        list[str] | None, several("Such as neighborhood:3/15/27, radial, frames:2; default: some of every kind.")
    ] = None,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Share of the softmax that a mask must keep.")] = 0.95,
    level: Annotated[
        list[str] | None, several("Of a trained VDiT: shares of noise in its input; default: 0.9,0.5,0.1.")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Of a VDiT: clips in a batch.")] = 2,
    call: Annotated[list[str] | None, several("Of a module:function: which calls of the model; default: 0.")] = None,
    query_frames: Annotated[
        int | None, typer.Option(min=1, help="Judge the queries of so many frames, evenly spread; default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing; 0: none.")] = 3,
    device: options.DEVICE = None,
    threads: options.THREADS = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, plots and report.html.")] = Path("out/masks"),
) -> None:
    """How much of a model's attention masks keep, by layer and head, and what each would save.

    The model runs once, dense. Every head is recommended the cheapest mask that keeps enough of its softmax.
    """
    from vdcore.integrations.mask_names import FORMS, parse_mask
    from vdcore_bench.suites import Options, kept, no_gpu

    names = options.split(mask)
    for name in names:
        try:
            parse_mask(name, (8, 8, 8))
        except ValueError as error:
            forms = "; ".join(f"{form}: {what}" for form, what in FORMS.items())
            raise typer.BadParameter(f"{error}; {forms}", param_hint="--mask") from None
    device = options.device_named(device)
    levels = _levels(options.split(level)) or LEVELS
    numbers = options.split(call)
    if not all(n.isdecimal() for n in numbers):
        raise typer.BadParameter(f"{', '.join(numbers)}: not numbers such as 0,3", param_hint="--call")
    if reason := no_gpu(Options(device=device)):
        print(f"vdcore masks: {reason}", file=sys.stderr)
        raise typer.Exit(1)
    options.prepare(device, threads)
    with plain_errors():
        title, subject, run, count = _subject(model, levels, clips, device)
        settings = kept.Settings(
            masks=names or None,
            calls=tuple(map(int, numbers)) or tuple(range(count)),
            query_frames=query_frames,
            rounds=rounds,
            keep=keep,
        )
        options.record(
            out, lambda journal, watch: _measure(kept.run, title, subject, run, settings, journal, watch, device)
        )


def _measure(run: Callable[..., Any], *given: Any) -> None:
    run(*given)


def _levels(values: tuple[str, ...]) -> tuple[float, ...]:
    try:
        levels = tuple(map(float, values))
    except ValueError:
        levels = (-1.0,)
    if not all(0 < level <= 1 for level in levels):
        raise typer.BadParameter(f"{', '.join(values)}: not shares such as 0.9,0.5", param_hint="--level")
    return levels


def _subject(name: str, levels: tuple[float, ...], clips: int, device: str) -> tuple[str, Any, Any, int]:
    """What it is called, the model, what calls it, and how many calls that is."""
    path = Path(name)
    if path.is_dir() or path.is_file():
        from vdcore.diffusion import runs

        return _trained(path / runs.CHECKPOINT if path.is_dir() else path, levels, clips, device)
    if ":" in name:
        return (name, *_own(name), 1)
    if name != RANDOM:
        expected = f"a checkpoint of vdcore train, module:function, {RANDOM}"
        raise typer.BadParameter(f"{name}: not known; known are {expected}", param_hint="--model")
    import torch

    from vdcore.models import VDiT
    from vdcore_bench.suites.models.vdit import VARIANTS

    torch.manual_seed(0)
    model = VDiT(VARIANTS[RANDOM]).to(device).eval()
    given = {"video": torch.randn(clips, 4, 8, 32, 32), "timestep": torch.full((clips,), 500.0)}
    return f"{RANDOM}, random weights", model, {key: x.to(device) for key, x in given.items()}, 1


def _trained(path: Path, levels: tuple[float, ...], clips: int, device: str) -> tuple[str, Any, Any, int]:
    """A VDiT on clips that it was not shown, with noise of every level."""
    import torch

    from vdcore.diffusion import runs
    from vdcore.diffusion.training import load_trained, process_for

    trained = load_trained(path, device)
    real = runs.real_clips(trained, clips)
    if real is None:
        raise ValueError(f"masks: the clips that {path} was trained on are not here")
    process = process_for(trained.recipe.target)
    clean = (real * 2 - 1).to(device)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def run() -> None:
        for level in levels:
            timestep = torch.full((clips,), level * (process.train_timesteps - 1), device=device)
            trained.model(process.add_noise(clean, noise, timestep), process.model_timestep(timestep))

    return f"VDiT after {trained.step} steps", trained.model, run, len(levels)


def _own(spec: str) -> tuple[Any, Any]:
    """What a function of the user's own returns; its module may lie in the working directory."""
    from vdcore_bench.own import own_function

    try:
        function = own_function(spec)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    found = function()
    if not isinstance(found, tuple) or len(found) != 2:
        raise typer.BadParameter(f"{spec}: must return a model and its inputs, got {found!r:.80}", param_hint="--model")
    return found
