"""Calibrates the measures of one video on synthetic motion whose flow is known: a table.

Scenes move at constant speed; each is measured along the flow that the renderer knows, and along the estimated one,
which is all there is of other videos. Then noise and flicker of known size come on top.
"""

import argparse

import torch

from vdcore.metrics import flow_consistency, mean_flow, optical_flow, temporal_flicker, warping_error
from vdcore.metrics.flow import Flow
from vdcore.video import MovingShapes


def scenes(speed, count, frames=6):
    shapes = MovingShapes(
        frames=frames,
        size=(64, 64),
        radius=(9.0, 14.0),
        speed=(speed, speed),
        pan=speed / 2,
        occluders=0,
        object_wave=(10.0, 20.0),
        background_wave=(16.0, 40.0),
    )
    return shapes.batch(range(count))


def row(name, video, truth):
    found = optical_flow(video)
    error = (found.forward - truth.forward).norm(dim=2).mean()
    consistency = flow_consistency(video, found)
    values = [
        f"{mean_flow(video, truth).mean():.2f}",
        f"{mean_flow(video, found).mean():.2f}",
        f"{error:.2f}",
        f"{1e4 * warping_error(video, truth).mean():.2f}",
        f"{1e4 * warping_error(video, found).mean():.2f}",
        f"{consistency.residual.mean():.2f}",
        f"{consistency.acceleration.mean():.3f}",
        f"{temporal_flicker(video).mean():.4f}",
    ]
    print("| " + " | ".join([name, *values]) + " |", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8)
    options = parser.parse_args(arguments)
    names = ("mean flow, true", "estimated", "flow's error", "warping error along the true flow", "along the estimated")
    names += ("residual", "acceleration", "flicker score")
    print("| scenes | " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * len(names))
    random = torch.Generator().manual_seed(0)
    for speed in (0.0, 0.5, 1.0, 2.0, 4.0, 6.0):
        scene = scenes(speed, options.clips)
        row(f"{speed:g} pixels a frame", scene.video, Flow(scene.flow, scene.flow_back))
    scene = scenes(1.0, options.clips)
    truth, plain = Flow(scene.flow, scene.flow_back), scene.video * 0.6 + 0.2
    for sigma in (0.02, 0.05):
        noisy = (plain + sigma * torch.randn(plain.shape, generator=random)).clamp(0, 1)
        row(f"1 pixel, noise of {sigma:g}", noisy, truth)
    for step in (0.02, 0.05):
        odd = (torch.arange(plain.shape[2]) % 2)[:, None, None]
        row(f"1 pixel, every other frame brighter by {step:g}", plain + step * odd, truth)


if __name__ == "__main__":
    main()
