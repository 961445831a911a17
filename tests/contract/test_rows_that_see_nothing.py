"""Hazard 10: a row that sees nothing gives 0 and -inf, and its gradient is 0."""

import pytest
import torch
from support import DTYPES, HALF, backends_of

import vdcore
from vdcore import FrameMask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op,backend",
    [(op, b) for op in ("temporal_attention", "video_attention") for b in backends_of(op) if b != "sdpa"],
)
def test_frame_attention(op, backend, dtype):
    q, k, v = (torch.randn(2, 6, 3, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    # Frames 4 and 5 of sample 0 and everything of sample 1 are past the lengths; a late q_start sees no key at all.
    for kwargs, blind in (
        ({"lengths": torch.tensor([4, 0])}, [(0, slice(4, 6)), (1, slice(0, 6))]),
        ({"q_start": 30, "mask": FrameMask.window(3)}, [(slice(None), slice(None))]),
    ):
        if backend == "triton" and dtype == torch.bfloat16:
            pytest.skip("bfloat16 is wrong under Triton's interpreter")
        if backend == "cuda" and dtype not in HALF:
            pytest.skip("the CUDA kernels have no float32")
        out, lse = getattr(vdcore, op)(q, k, v, return_lse=True, backend=backend, **kwargs)
        assert out.isfinite().all()
        grads = torch.autograd.grad(out.float().square().sum() + lse.masked_fill(lse.isinf(), 0).sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)
        for where in blind:
            assert out[where].eq(0).all() and lse[where].eq(-torch.inf).all() and grads[0][where].eq(0).all()
        if "lengths" in kwargs:
            assert out[0, :4].ne(0).any() and grads[1][1].eq(0).all() and grads[2][0, 4:].eq(0).all()


@pytest.mark.parametrize("backend", [b for b in backends_of("cross_attention") if b != "sdpa"])
def test_cross_attention(backend):
    q = torch.randn(2, 2, 3, 2, 16, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 16, requires_grad=True) for _ in range(2))
    out = vdcore.cross_attention(q, k, v, lengths=torch.tensor([3, 0]), backend=backend)
    assert out[1].eq(0).all() and out[0].ne(0).any()
    out.square().sum().backward()
    assert q.grad[1].eq(0).all() and k.grad[1].eq(0).all() and v.grad[0, 3:].eq(0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("backend", backends_of("gated_attention"))
def test_gated_attention(backend):
    qkv = tuple(torch.randn(2, 4, 3, 2, 16, requires_grad=True) for _ in range(3))
    gate = torch.tensor(0.4, requires_grad=True)
    out = vdcore.gated_attention(qkv, qkv, gate, lengths=torch.tensor([2, 0]), backend=backend)
    assert out[0, 2:].eq(0).all() and out[1].eq(0).all() and out[0, :2].ne(0).any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (*qkv, gate)) and qkv[0].grad[1].eq(0).all()
