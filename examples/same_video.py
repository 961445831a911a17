"""Does the swap change the video? A pipeline's, from one seed, as diffusers makes it and on vdcore, side by side.

The pipeline is Wan's, tiny and with random weights: its video is noise, and the comparison is what yours would be. With
``--window N`` it is of a model whose full attention sees N frames to either side, which changes the video and should.
"""

import argparse

import tiny_pipelines
from vdcore import FrameMask
from vdcore.integrations.diffusers import swap_in


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--window", type=int, help="frames to either side; default: all of them")
    parser.add_argument("--out", default="out/same_video.png")
    options = parser.parse_args(arguments)
    pipeline = tiny_pipelines.wan()
    report = swap_in(pipeline, mask=None if options.window is None else FrameMask.symmetric(options.window))
    print(report)
    found = report.check(pipeline, **tiny_pipelines.wan_inputs(options.frames, options.steps))
    print(found.show(options.out))


if __name__ == "__main__":
    main()
