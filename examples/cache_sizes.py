"""Measures what a rolling cache costs: bytes, error and time per chunk, by the dtype of its keys and values.

One stream of random chunks goes through a model with random weights, once per kind of cache. Errors are those against a
float32 cache of the same form, root mean square over root mean square: of the keys and values that are held at the end,
and of all that the model returned.
"""

import argparse
import statistics
import time

import torch

from vdcore import FrameMask
from vdcore.models import VDiT, VDiTConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def model_of(mask, width):
    torch.manual_seed(0)
    config = VDiTConfig(
        in_channels=4, width=width, depth=4, heads=4, attention="full", mask=mask, position="rope", qk_norm=True
    )
    model = VDiT(config).eval()
    for parameter in model.parameters():  # as initialised, gates are closed and hide what is behind them
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@torch.no_grad()
def stream(model, frames, size, *, dtype, relative):
    """Outputs of chunk after chunk, the cache, and processor seconds per chunk."""
    chunk, random = model.config.mask.chunk, torch.Generator().manual_seed(1)
    cache, results, seconds = model.new_cache(1, size, size, dtype=dtype, relative=relative), [], []
    for _ in range(frames // chunk):
        video = torch.randn(1, 4, chunk, size, size, generator=random)
        begin = time.process_time()
        results.append(model(video, torch.full((1,), 500.0), cache=cache, keep=True))
        seconds.append(time.process_time() - begin)
    return torch.stack(results), cache, seconds


def held(cache):
    """All keys and values, as attention reads them."""
    slots = [x for ring in cache.rings for x in (ring.k, ring.v)]
    return torch.cat([(x.data.float() * (1 if x.scale is None else x.scale)).flatten() for x in slots])


def error_of(found, exact):
    return (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--size", type=int, default=8, help="latent pixels")
    parser.add_argument("--width", type=int, default=64, help="channels per token")
    options = parser.parse_args(arguments)
    mask = FrameMask(past=3, future=0, chunk=4, sink=4)
    model = model_of(mask, options.width)
    full = 1 + -(-(mask.sink + (mask.past + 1) * mask.chunk) // mask.chunk)  # chunks until the ring is full
    print("| keys | dtype | bytes | error of what is held | error of the output | ms per chunk, begin | at the end |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for relative in (False, True):
        exact = None
        for name, dtype in DTYPES.items():
            out, cache, seconds = stream(model, options.frames, options.size, dtype=dtype, relative=relative)
            exact = (held(cache), out) if exact is None else exact
            errors = " | ".join(f"{error_of(*pair):.2%}" for pair in zip((held(cache), out), exact))
            quarter = max((len(seconds) - full) // 4, 1)
            first, last = (1e3 * statistics.median(s) for s in (seconds[full : full + quarter], seconds[-quarter:]))
            keys = "rotated on read" if relative else "rotated"
            print(f"| {keys} | {name} | {cache.nbytes:,} | {errors} | {first:.1f} | {last:.1f} |", flush=True)


if __name__ == "__main__":
    main()
