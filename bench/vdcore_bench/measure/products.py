"""What torch's product of matrices reaches on this CPU: a model's linear layers, and a floor under attention."""

from __future__ import annotations

import math
import time
from functools import lru_cache

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE = 1024  # rows, columns and terms
SECONDS = 0.15  # of a dtype
SHARE = 0.7  # of that rate: what attention, whose products are smaller and wait for a softmax, can be asked for


def products() -> dict[str, float]:
    """GFLOP/s of torch's product of 1,024 on the CPU, by dtype: what a model's linear layers run at.

    Takes half a second, a second on a slow machine. Where a dtype has no instructions a product can be hundreds of
    times slower: it is timed on as many rows as fit into its share of that.
    """
    return {str(dtype).removeprefix("torch."): _rate(dtype) for dtype in DTYPES}


def floor(flops: float, dtype: torch.dtype) -> float:
    """Seconds of this many FLOPs at 70 % of the rate of torch's product, with as many threads as torch has now.

    A dtype whose products are slower than float32's is computed in float32.
    """
    rates = [_rate_with(threads=torch.get_num_threads(), dtype=one) for one in {dtype, torch.float32}]
    return flops / (SHARE * 1e9 * max(rates))


@lru_cache
def _rate_with(threads: int, dtype: torch.dtype) -> float:
    return _rate(dtype)


@torch.inference_mode()
def _rate(dtype: torch.dtype) -> float:
    a, b = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
    rows = 16
    while True:
        least = _least_seconds(a[:rows], b)
        if rows == SIZE or 8 * least > SECONDS:
            return 2e-9 * rows * SIZE**2 / least
        rows *= 8


def _least_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of a product, over a third of the time: others may use the processors, and the first call prepares."""
    least, calls, start = math.inf, 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - start < SECONDS / 3:
        before = time.perf_counter()
        torch.mm(a, b)
        least = min(least, time.perf_counter() - before)
        calls += 1
    return least
