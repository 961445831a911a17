"""What only hardware can say of the CUDA kernels: repeats, graphs, streams, and NVIDIA's sanitizer."""

import shutil
import subprocess
import sys

import pytest
import torch

import vdcore
from vdcore import FrameMask
from vdcore.ops.choose import BACKENDS

pytestmark = pytest.mark.skipif(BACKENDS["cuda"].missing() is not None, reason=str(BACKENDS["cuda"].missing()))

SHAPES = [(2, 8, 50, 3, 40), (1, 16, 300, 4, 72), (1, 30, 64, 2, 128), (1, 60, 16, 2, 64)]


def leaves_of(shape):
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def step(leaves, **kwargs):
    out = vdcore.temporal_attention(*leaves, mask=FrameMask.window(7), backend="cuda", **kwargs)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_hundred_repeats_give_the_same_bits(shape):
    leaves = leaves_of(shape)
    first = step(leaves)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, step(leaves)))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_cuda_graph(shape):
    """Captured, then replayed on other values."""
    leaves, lengths = leaves_of(shape), torch.tensor([5, 7], device="cuda")[: shape[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(leaves, lengths=lengths)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, lengths=lengths)
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(leaves, lengths=lengths)))


def test_side_stream():
    """Inputs that are still being written on the stream of the call."""
    source = [torch.randn(1, 16, 300, 4, 72, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = step([x.clone().requires_grad_() for x in source])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        found = step([x.clone().requires_grad_() for x in source])
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_an_error_names_the_operator():
    q = torch.randn(1, 4, 3, 2, 24, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(vdcore.BackendError, match="temporal_attention"):
        vdcore.temporal_attention(q, q.expand(1, 4, 3, 2, 24)[:, [0] * 257], q[:, [0] * 257], backend="cuda")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    code = """
import sys, torch, vdcore
for shape in ((1, 8, 9, 3, 40), (1, 30, 5, 2, 72), (1, 60, 2, 1, 64)):
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    out = vdcore.temporal_attention(*leaves, mask=vdcore.FrameMask.window(5), backend="cuda")
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    with torch.no_grad():
        # The kernel of Hopper; racecheck knows neither its copies nor its products.
        if torch.cuda.get_device_capability() == (9, 0) and sys.argv[1] != "racecheck":
            vdcore.gated_attention(leaves, leaves, torch.tensor(0.3, device="cuda"), backend="cuda")
"""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code, tool]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
