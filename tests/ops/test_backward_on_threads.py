"""Frame attention's backward on many threads: every number of them gives the same bits, and 64 would have work."""

import heapq

import numpy as np
import pytest
import torch

import vdcore
from vdcore import FrameMask
from vdcore.ops.call import mask_numbers
from vdcore.ops.native import missing as why_no_native
from vdcore.ops.native import native
from vdcore_bench.workloads import load

pytestmark = pytest.mark.skipif(why_no_native() is not None, reason=str(why_no_native()))

ROWS = 96  # of queries, in one product with a tile of keys
THREADS = 64


# ---- Bits ----


def qkv(B, T, S, H, D, *, G=None, L=None):
    G = H if G is None else G
    keys = (B, T, S, G, D) if L is None else (B, L, G, D)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((B, T, S, H, D), keys, keys)]


CASES = {  # chains of keys: fewer than threads, of unlike lengths, grouped; parts of queries, and lengths
    "dense": lambda: (vdcore.video_attention, qkv(1, 6, 150, 2, 40, G=1), {}),
    "causal": lambda: (vdcore.video_attention, qkv(1, 6, 150, 3, 24), {"mask": FrameMask.causal()}),
    "window and sink": lambda: (vdcore.video_attention, qkv(2, 7, 140, 1, 24), {"mask": FrameMask(2, 1, sink=1)}),
    "teacher forcing": lambda: (vdcore.video_attention, qkv(1, 8, 140, 1, 24), {"mask": FrameMask.teacher_forcing(4)}),
    "one frame": lambda: (vdcore.spatial_attention, qkv(1, 1, 900, 3, 40), {}),
    "prompt": lambda: (vdcore.cross_attention, qkv(1, 3, 400, 2, 40, L=130), {}),
    "prompts": lambda: (
        vdcore.cross_attention,
        qkv(2, 3, 400, 2, 40, G=1, L=130),
        {"lengths": torch.tensor([0, 100])},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads(case, dtype):
    function, tensors, more = CASES[case]()
    leaves = [x.to(dtype).requires_grad_() for x in tensors]

    def gradients(threads):
        torch.set_num_threads(threads)
        out = function(*leaves, backend="cpu", **more)
        return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.shape[-1], dtype=dtype).expand_as(out))

    before = torch.get_num_threads()
    try:
        alone = gradients(1)
        for threads in (2, 3, 5, 17):
            for name, x, y in zip("qkv", alone, gradients(threads)):
                assert torch.equal(x, y), f"d{name} on {threads} threads"
    finally:
        torch.set_num_threads(before)


def test_a_plan_is_a_matter_of_sizes_where_bits_are():
    """Sums of keys in parts have other bits than whole ones: threads must not choose between them."""
    for groups, heads in (
        (native().prompt_groups(1, 4, 1024, 120, False, None), 16),
        (native().frame_groups(mask_numbers(FrameMask()), 1, 4, 4, 300, 0, None, 0, None, False), 5),
    ):
        plans = [groups.backward_plan(heads, heads, 64, threads) for threads in (1, 2, 16, 64, 256)]
        assert len({plan["parts"] for plan in plans}) == 1


# ---- Work ----


def busy(groups, H, G, D, threads):
    """The share of the threads' time in which they would compute: every product with 96 rows takes one step."""
    plan = groups.backward_plan(H, G, D, threads)
    if not plan["together"]:
        turns = -(-plan["items"] // threads)
        return plan["items"] / (turns * threads)
    chains = components(groups)
    free, done, work = [0.0] * threads, [], 0
    for tiles, rows in chains:
        for _ in range(G):
            passed, finish = None, 0.0
            for number, visits in enumerate(tiles):
                start = heapq.heappop(free)
                if number == 0 and len(done) >= plan["buffers"]:
                    start = max(start, done[-plan["buffers"]])
                at = np.concatenate([visits + h * rows for h in range(H // G)])
                came = np.full(len(at), start) if passed is None else np.maximum(passed[at], start)
                steps = np.arange(len(at))
                times = np.maximum.accumulate(came - steps) + steps + 1  # one after another, and after the tile before
                work += len(at)
                finish = max(finish, float(times[-1]) if len(at) else start)
                passed = np.full(rows * (H // G), finish)
                passed[at] = times
                passed = np.minimum.accumulate(passed[::-1])[::-1]  # who is further on has passed
                heapq.heappush(free, finish)
            done.append(finish)
    return work / (threads * max(free))


def components(groups):
    """For each: the steps that its tiles of keys go through, and how many there are."""
    found, tiles, sample = [], [], 0
    for at, (_, begin, end), runs in groups.keys:
        if at != sample:
            found, tiles, sample = [*found, tiles], [], at
        visits = [np.arange(b // ROWS, -(-e // ROWS)) for text, b, e in runs if not text]
        steps = np.unique(np.concatenate(visits)) if visits else np.arange(0)
        tiles += [steps] * -(-(end - begin) // 128)
    found.append(tiles)
    return [(tiles, 1 + max(int(steps[-1]) for steps in tiles if len(steps))) for tiles in found]


def frames(w, mask):
    T, S = w.frames, w.tokens_per_frame
    return native().frame_groups(mask_numbers(mask), 1, T, T, S, 0, None, 0, None, False)


@pytest.mark.parametrize("name", load())
def test_64_threads_have_work(name):
    """Of every model at its full size, one sample: at most a quarter of their time is waiting."""
    w = load()[name]
    sizes = (w.heads, w.kv_heads, w.head_dim, THREADS)
    if "spatial" in w.attention and w.frames > 1:
        assert busy(frames(w, FrameMask.same_frame()), *sizes) >= 0.75
    if "video" in w.attention:
        assert busy(frames(w, w.mask), *sizes) >= 0.75
    if w.text == "cross" and w.text_tokens > 1:
        prompt = native().prompt_groups(1, w.frames, w.tokens_per_frame, w.text_tokens, False, None)
        assert busy(prompt, *sizes) >= 0.75
