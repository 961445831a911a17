"""Nothing is kept but results: output, lse with gradients, and gradients; beside them at most 1 MB per thread."""

import pytest
from support import run_python

MEASURE = """
call(8)                                # threads and their scratch exist
def peak():                            # kilobytes; reset by writing 5 to clear_refs
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
out = call(most)
results = sum(x.nbytes for x in (out if isinstance(out, tuple) else (out,)))
print((peak() - before) * 1024 - results)
"""


TEMPORAL = """
import torch, vdcore
T, most, H, D = {shape}
dtype = torch.{dtype}
q, k, v = torch.randn(1, T, most, 3, H, D).to(dtype).unbind(3)
norm = vdcore.QKNorm(torch.ones(D), torch.ones(D))
def call(n):
    return vdcore.temporal_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], norm=norm, backend="cpu", **dict({kwargs}))
"""
# The gathered patches would take as much as the video: 8 MiB.
PATCHIFY = """
import torch, vdcore
most = 128
video, weight = torch.randn(1, 16, 8, most, 128).to(torch.{dtype}), torch.randn(256, 16, 1, 2, 2).to(torch.{dtype})
def call(n):
    return vdcore.patchify(video[:, :, :, :n], weight, backend="cpu")
"""
UNPATCHIFY = """
import torch, vdcore
most, options = 64, dict(channels=16, patch=(1, 2, 2))
tokens, weight = torch.randn(1, 8, most * 64, 256).to(torch.{dtype}), torch.randn(64, 256).to(torch.{dtype})
def call(n):
    return vdcore.unpatchify(tokens[:, :, : n * 64], weight, grid=(8, n, 64), backend="cpu", **options)
"""


# All scores would take 268 MB.
TANGENTS = """
import torch, vdcore
most = 512
q, k, v = torch.randn(3, 1, 8, most, 4, 64)
def call(n):
    some = tuple(x[:, :, :n] for x in (q, k, v))
    return torch.func.jvp(lambda *qkv: vdcore.video_attention(*qkv, backend="cpu"), some, some)
"""


# A copy of q, k or v would take 7 MB.
WINDOWS = """
import torch, vdcore
most, D, dtype = 24, 64, torch.{dtype}
q, k, v = torch.randn(3, 1, 8, most, 36, 4, D).to(dtype)
mask = vdcore.GridMask.neighborhood((3, 7, 9))
def attend(n, *qkv):
    return vdcore.video_attention(*qkv, mask=mask, grid=(n, 36), return_lse=True, backend="cpu")
def call(n):
    return attend(n, *(x[:, :, :n].flatten(2, 3) for x in (q, k, v)))
"""
TILES = """
import torch, vdcore
most, D, dtype, tile = 24, 64, torch.{dtype}, (2, 4, 6)
q, k, v = torch.randn(3, 1, 8, most, 36, 4, D).to(dtype)
lists = {{n: vdcore.select_tiles(*(x[:, :, :n].flatten(2, 3) for x in (q, k)), tile=tile, grid=(n, 36), keep=9)
         for n in (8, most)}}
def attend(n, *qkv):
    return vdcore.tile_attention(*qkv, lists[n], tile=tile, grid=(n, 36), return_lse=True, backend="cpu")
def call(n):
    return attend(n, *(x[:, :, :n].flatten(2, 3) for x in (q, k, v)))
"""


# After WINDOWS or TILES: forward is done before, and gradients of q, k and v are what a call returns.
GRADIENTS = """
forward, done = call, {{}}
for n in (8, most):
    leaves = [x[:, :, :n].detach().requires_grad_() for x in (q, k, v)]
    q, k, v, kept = *leaves, (q, k, v)
    done[n] = forward(n)[0], leaves
    q, k, v = kept
dout = torch.ones_like(done[most][0])
def call(n):
    out, leaves = done[n]
    return torch.autograd.grad(out, leaves, dout[:, :, : n * 36], retain_graph=True)
"""
# After WINDOWS or TILES.
PUSHED = """
def call(n):
    some = tuple(x[:, :, :n].flatten(2, 3) for x in (q, k, v))
    results, tangents = torch.func.jvp(lambda *qkv: attend(n, *qkv), some, some)
    return (*results, *tangents)
"""


@pytest.mark.parametrize("more", ["", GRADIENTS, PUSHED], ids=["forward", "backward", "tangents"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("code", [WINDOWS, TILES], ids=["windows", "tiles"])
def test_windows_and_tiles(code, dtype, more):
    """Tokens are gathered where they lie: no copy of q, k, v, their gradients or tangents in any layout."""
    check((code + more).format(dtype=dtype))


@pytest.mark.parametrize("kwargs", ["", "return_lse=True", "mask=vdcore.FrameMask(past=5, future=0, sink=1)"])
@pytest.mark.parametrize(
    "shape,dtype", [((16, 512, 16, 72), "float32"), ((28, 200, 24, 128), "bfloat16"), ((200, 40, 8, 64), "float32")]
)
def test_temporal_forward(shape, dtype, kwargs):
    check(TEMPORAL.format(shape=shape, dtype=dtype, kwargs=kwargs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("code", [PATCHIFY, UNPATCHIFY], ids=["patchify", "unpatchify"])
def test_patches(code, dtype):
    """No copy of the video beside the tokens."""
    check(code.format(dtype=dtype))


def test_tangents():
    """Beside the output and its tangent two numbers a row, and tiles."""
    check(TANGENTS)


def check(code):
    import torch

    extra = int(run_python(code + MEASURE))
    limit = (torch.get_num_threads() + 1) * 2**20  # 1 MiB for the measuring
    assert extra <= limit, f"{extra} bytes beyond the results"
