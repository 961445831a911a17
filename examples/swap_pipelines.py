"""Shows the swap of whole pipelines: AnimateDiff's, SVD's and Wan's give the same video from the same seed.

They are tiny, with random weights; ``from_pretrained`` in their place is all that yours need.
"""

import argparse

import tiny_pipelines
from vdcore.integrations.diffusers import swap_in, swap_out

NAMES = ("animatediff", "svd", "wan")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--frames", type=int, default=9, help="of the video; Wan takes multiples of 4, and one more")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(arguments)
    for name in options.names:
        pipeline = getattr(tiny_pipelines, name)()
        report = swap_in(pipeline)
        print(f"\n{name}\n{report}")
        inputs = getattr(tiny_pipelines, f"{name}_inputs")(options.frames, options.steps)
        report.check(pipeline, **inputs)  # runs the host's code and vdcore's, and prints how far apart they are
        swap_out(pipeline)


if __name__ == "__main__":
    main()
