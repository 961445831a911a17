"""Hazards 1, 3, 12, 23: more than 65,535 of anything, and offsets past 2**31."""

import pytest
import torch
from support import backends_of, run_python

import vdcore
from vdcore import FrameMask

NATIVE = [b for b in backends_of("temporal_attention") if b == "cpu"]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("B,S,H", [(1, 65_537, 1), (3, 21_846, 2), (70_000, 1, 1), (1, 1, 70_000)])
def test_many_sequences(backend, B, S, H):
    """Batch, positions and heads whose product, or any one of them, passes 65,535."""
    q, k, v = (torch.randn(B, 4, S, H, 8, requires_grad=True) for _ in range(3))
    out = vdcore.temporal_attention(q, k, v, mask=FrameMask.causal(), backend=backend)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    picks = [(0, 0, 0), (B - 1, S - 1, H - 1), (B // 2, S // 2, H // 2), (B - 1, max(S - 2, 0), 0)]
    for b, s, h in picks:
        one = [x[b : b + 1, :, s : s + 1, h : h + 1].detach().requires_grad_() for x in (q, k, v)]
        expected = vdcore.temporal_attention(*one, mask=FrameMask.causal(), backend="reference")
        at = (slice(b, b + 1), slice(None), slice(s, s + 1), slice(h, h + 1))
        torch.testing.assert_close(out[at], expected)
        for ours, theirs in zip(grads, torch.autograd.grad(expected, one, dout[at])):
            torch.testing.assert_close(ours[at], theirs)


@pytest.mark.parametrize("T", [32_769, 65_537])
def test_many_frames(T):
    """One window over a very long clip: 16-bit indices would wrap."""
    q, k, v = (torch.randn(1, T, 1, 1, 8, requires_grad=True) for _ in range(3))
    mask = FrameMask(past=3, future=0, sink=1)
    out = vdcore.temporal_attention(q, k, v, mask=mask, backend="cpu")
    dout = torch.randn_like(out)
    dq = torch.autograd.grad(out, q, dout)[0]
    last = slice(T - 8, T)
    keys = torch.cat([torch.tensor([0]), torch.arange(T - 11, T)])
    one = [q[:, last].detach().requires_grad_(), k[:, keys].detach(), v[:, keys].detach()]
    expected = vdcore.temporal_attention(*one, mask=mask, backend="reference", q_start=4)
    torch.testing.assert_close(out[:, last], expected)
    torch.testing.assert_close(dq[:, last], torch.autograd.grad(expected, one[0], dout[:, last])[0])


def test_offsets_past_31_bits():
    """Frames 2**31 elements apart, in memory that is reserved but, but for a few pages, never touched."""
    code = """
import torch, vdcore
far = 2**31 + 64
storage = torch.empty(2 * far + 4096, dtype=torch.bfloat16)   # 17 GB of addresses, a few pages of memory
def apart(seed):
    x = storage[seed * 512:].as_strided((1, 3, 2, 2, 16), (0, far, 32, 16, 1))
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
    return x
tensors = [apart(i) for i in range(4)]
q, k, v, dout = tensors
near = [x.clone() for x in tensors]
def run(q, k, v, dout, backend):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = vdcore.temporal_attention(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
for a, b in zip(run(*tensors, "cpu"), run(*near, "cpu")):
    assert torch.equal(a, b)
for a, b in zip(run(*tensors, "cpu"), run(*near, "reference")):
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
print("right")
"""
    assert run_python(code).strip() == "right"


@pytest.mark.large
def test_more_than_2_31_elements():
    """299,521 rows x 56 heads x 128 channels: what a long video has, and what int32 strides cannot hold."""
    q, k, v = (torch.randn(1, 2, 149_761, 56, 128, dtype=torch.bfloat16) for _ in range(3))
    out = vdcore.temporal_attention(q, k, v, backend="cpu")
    last = [x[:, :, -1:] for x in (q, k, v)]
    torch.testing.assert_close(
        out[:, :, -1:], vdcore.temporal_attention(*last, backend="reference"), rtol=2e-2, atol=2e-2
    )
