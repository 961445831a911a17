"""Temporal attention: edges of tiles, results that are merged, caches, packed gradients."""

import pytest
import torch

import vdcore
from vdcore import FrameMask, QKNorm, Rope
from vdcore.testing import Case, check


# Lengths around every tile edge of every instruction set, and masks whose runs start and end inside tiles.
@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129])
@pytest.mark.parametrize(
    "mask",
    [FrameMask(), FrameMask.causal(), FrameMask(past=3, future=2, chunk=2, sink=3)],
    ids=["full", "causal", "runs"],
)
def test_frames(T, mask):
    def build(d):
        shape = (1, T, 3, 2, 20)
        return {"q": d("q", *shape), "k": d("k", *shape), "v": d("v", *shape), "mask": mask, "return_lse": True}

    check(Case("temporal_attention", f"{T} frames", build), "cpu")


def test_partial_results_merge_through_lse():
    """Attention over two halves of the keys, merged by their lse, is attention over all, and so are its gradients."""
    q, k, v = (torch.randn(1, n, 4, 2, 16, requires_grad=True) for n in (5, 9, 9))
    whole = vdcore.temporal_attention(q, k, v)
    parts = [vdcore.temporal_attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 9))]
    lse = torch.stack([lse for _, lse in parts])
    merged = (lse.softmax(0)[..., None] * torch.stack([out for out, _ in parts])).sum(0)
    torch.testing.assert_close(merged, whole)
    dout = torch.randn_like(whole)
    for a, b in zip(torch.autograd.grad(merged, (q, k, v), dout), torch.autograd.grad(whole, (q, k, v), dout)):
        torch.testing.assert_close(a, b)


def test_cached_keys_are_the_same_as_all_at_once():
    """New frames against kept keys, normed and rotated when they came, are the last rows of the whole clip."""
    T, new, D = 7, 2, 16
    q, k, v = (torch.randn(2, T, 3, 2, D) for _ in range(3))
    norm = QKNorm(torch.rand(D) + 0.5, torch.rand(D) + 0.5)
    angle = torch.randn(T, 1, D // 2)
    rope, mask = Rope(angle.cos(), angle.sin()), FrameMask.window(3)
    whole = vdcore.temporal_attention(q, k, v, norm=norm, rope=rope, mask=mask)
    cache = vdcore.qk_norm_rope(k[:, :-new], k[:, :-new], norm=norm, rope=rope)[1]
    q_new, k_new = vdcore.qk_norm_rope(q[:, -new:], k[:, -new:], norm=norm, rope=rope, frame_start=T - new)
    part = vdcore.temporal_attention(q_new, torch.cat((cache, k_new), 1), v, mask=mask)
    torch.testing.assert_close(part, whole[:, -new:])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_hidden_bias_is_not_read(backend):
    """NaN of pairs that are not visible stays there, one that is comes out; gradients of hidden pairs are 0."""
    T, mask = 6, FrameMask(past=2, future=0)
    q, k, v = (torch.randn(2, T, 5, 2, 16, requires_grad=True) for _ in range(3))
    seen = mask.visible(T)
    bias = torch.where(seen, torch.randn(2, T, T), torch.nan).requires_grad_()
    clean = torch.where(seen, bias.detach(), 0.0)
    given = {"mask": mask, "backend": backend}
    out = vdcore.temporal_attention(q, k, v, bias=bias, **given)
    torch.testing.assert_close(out, vdcore.temporal_attention(q, k, v, bias=clean, **given))
    (dbias,) = torch.autograd.grad(out.square().sum(), bias)
    assert dbias[:, seen].isfinite().all() and dbias[:, seen].any() and not dbias[:, ~seen].any()
    bias.data[0, 3, 2] = torch.nan
    assert vdcore.temporal_attention(q, k, v, bias=bias, **given)[:, 3, :, 0].isnan().all()


def test_bias_errors_and_reasons():
    q = torch.randn(1, 4, 3, 2, 16)
    for bias, expected in (
        (torch.zeros(3, 4, 4), r"bias must be \(H or 1, T, T_k\) = \(2, 4, 4\), got \(3, 4, 4\)"),
        (torch.zeros(1, 4, 5), r"= \(1, 4, 4\), got \(1, 4, 5\)"),
        (torch.zeros(4, 4), r"bias must be \(H or 1, T, T_k\), got \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            vdcore.temporal_attention(q, q, q, bias=bias)
    with pytest.raises(TypeError, match=r"bias must be torch\.float32"):
        vdcore.temporal_attention(q, q, q, bias=torch.zeros(1, 4, 4, dtype=torch.float64))
    reasons = dict(vdcore.explain("temporal_attention", q, q, q, bias=torch.zeros(1, 4, 4)))
    assert reasons["sdpa"] == "a bias would need a mask" and reasons["reference"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gradient_has_the_same_bits(dtype):
    """Run after run and on any number of threads, from sums over 1,200 positions."""
    q, k, v = (torch.randn(2, 9, 600, 2, 24).to(dtype) for _ in range(3))
    bias = torch.randn(2, 9, 9, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found += torch.autograd.grad(vdcore.temporal_attention(q, k, v, bias=bias).square().sum(), bias)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(dbias, found[0]) for dbias in found)


def test_packed_gradient_is_one_tensor():
    qkv = torch.randn(1, 4, 3, 3, 2, 16, requires_grad=True)
    vdcore.temporal_attention(qkv).sum().backward()
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(3))
    vdcore.temporal_attention(q, k, v).sum().backward()
    torch.testing.assert_close(qkv.grad, torch.stack([q.grad, k.grad, v.grad], 3))
    assert qkv.grad.is_contiguous()


@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("magnitude", [1e3, 1e5, 1e8, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_beyond_what_exp_bears(dtype, magnitude, scale):
    """Up to 1e30: the largest one still has all the weight, and no row sums to 0 or to NaN."""
    q, k, v = (torch.randn(1, 20, 5, 2, 40) for _ in range(3))
    q, k, v = ((x * size).to(dtype) for x, size in ((q, magnitude), (k, magnitude), (v, 1)))
    out, lse = vdcore.temporal_attention(q, k, v, scale=scale, return_lse=True, backend="cpu")
    exact, exact_lse = vdcore.temporal_attention(q.double(), k.double(), v.double(), scale=scale, return_lse=True)
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=1e-5)
