"""Shows sparse attention: a Wan whose tokens see windows in frames, rows and columns, or radially, without training.

The model is small, with random weights: what a mask saves is what it would save, what it changes says nothing about a
trained one. ``vdcore masks`` finds out which mask yours bears.
"""

import argparse
import time

import torch

import tiny_models
from vdcore import FrameMask
from vdcore.integrations.diffusers import swap_in
from vdcore.integrations.mask_names import parse_mask

MASKS = ("dense", "frames:2", "neighborhood:5/7/9", "tiles:3/3/3:2/4/4", "radial")


@torch.no_grad()
def seconds_of(model, inputs, calls):
    """The result and the least seconds of a call, the first of which warms up."""
    found = []
    for _ in range(1 + calls):
        begin = time.perf_counter()
        out = model(**inputs, return_dict=False)[0]
        found.append(time.perf_counter() - begin)
    return out, min(found[1:])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("masks", nargs="*", default=MASKS, help="named as `vdcore masks` names them")
    parser.add_argument("--calls", type=int, default=3, help="timed calls")
    options = parser.parse_args(arguments)
    model, inputs = tiny_models.wan()
    grid = (tiny_models.FRAMES, tiny_models.ROWS, tiny_models.COLUMNS)
    swap_in(model)
    dense, dense_seconds = seconds_of(model, inputs, options.calls)
    print("| mask | visible | time / dense | changes the result by |\n| --- | ---: | ---: | ---: |")
    for name in options.masks:
        mask = parse_mask(name, grid)
        visible = mask.density(grid[0]) if isinstance(mask, FrameMask) else mask.density(*grid)
        report = swap_in(model, mask=mask)
        out, seconds = seconds_of(model, inputs, options.calls)
        change = (out - dense).norm() / dense.norm()
        print(f"| {name} | {100 * visible:.1f}% | {seconds / dense_seconds:.2f} | {change:.1e} |")
        with report.dense():  # first steps of a sampler, say
            out, _ = seconds_of(model, inputs, 1)
        assert torch.allclose(out, dense, atol=1e-4), name


if __name__ == "__main__":
    main()
