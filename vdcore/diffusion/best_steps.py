"""How many of the sampler's steps suit a trained model: measured once, after training, and kept beside its checkpoint.

Few steps draw what clips have in common, many a clip with the model's own errors in it. Which is better depends on what
was learned: of films, a small model goes on best with one or two steps, and draws moving shapes best with eight.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vdcore.diffusion.measure import Comparison, against, measure_continued
from vdcore.diffusion.runs import STEPS, continue_clips, draw_videos, real_clips
from vdcore.diffusion.training import Trained

FILE = "sampling.json"
TRIED = (1, 2, 4, 8)
CLIPS = 48  # drawn of each number of steps, and gone on with


@dataclass(frozen=True)
class BestSteps:
    """Steps of the sampler, by what is drawn.

    Args:
        draw: for videos from noise.
        go_on: for the second half of clips whose first half is known.
        step: of training, that the model had.
    """

    draw: int = STEPS
    go_on: int = STEPS
    step: int = 0


def measure_steps(
    trained: Trained, device: torch.device | str = "cpu", on_tried: Callable[[int], None] | None = None
) -> BestSteps | None:
    """The best of 1, 2, 4 and 8 steps; None where the clips of training are gone, or of one frame.

    Videos from noise: the least temporal FID of those that move as real clips do, of all if none does. What goes on
    with clips: the least warping error along their real flow.

    Args:
        on_tried: called with each number of steps that has been measured.
    """
    real = real_clips(trained, 2 * CLIPS)
    if real is None or real.shape[2] < 3:
        return None
    compare, drawn, errors = against(real), dict[int, Comparison](), dict[int, float]()
    for steps in TRIED:
        drawn[steps] = compare(draw_videos(trained, CLIPS, steps=steps, device=device))
        more = continue_clips(trained, real[:CLIPS], steps=steps, device=device)
        if more is not None:
            errors[steps] = measure_continued(real[:CLIPS], *more)["samples"].warping_error
        if on_tried is not None:
            on_tried(steps)
    moving = [steps for steps in TRIED if drawn[steps].moves_as_real] or list(TRIED)
    draw = min(moving, key=lambda steps: drawn[steps].temporal_fid)
    return BestSteps(draw, min(errors, key=lambda steps: errors[steps]) if errors else draw, trained.step)


def save(found: BestSteps, folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(asdict(found)) + "\n")


def load(checkpoint: Path, step: int) -> BestSteps | None:
    """What was measured of this checkpoint at this step of training; None where nothing was."""
    path = checkpoint.parent / FILE
    found = BestSteps(**json.loads(path.read_text())) if path.is_file() else None
    return found if found is not None and found.step == step else None
