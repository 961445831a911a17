"""Why float32 is multiplied exactly on Triton: a model of attention whose products are three of tf32 each.

The interpreter multiplies in float32 whatever it is told, so this is the arithmetic in PyTorch: operands in two parts
of 11 bits, their products without the smallest, exact sums over 8 of depth, as an instruction's, added to float32.
"""

import math

import pytest
import torch


def parts(x):
    """x as a tf32 number, of what is left another one; both cut toward zero."""
    bits = ~torch.tensor(0x1FFF, dtype=torch.int32)
    first = (x.view(torch.int32) & bits).view(torch.float32)
    return first, ((x - first).view(torch.int32) & bits).view(torch.float32)


def tf32x3(a, b, cuts):
    """a [M, K] times b [K, N]. cuts: sums are cut toward zero, as tensor cores do, else rounded to the nearest."""
    (a0, a1), (b0, b1) = parts(a), parts(b)
    total = torch.zeros(a.shape[0], b.shape[1])
    for x, y in ((a1, b0), (a0, b1), (a0, b0)):
        for k in range(0, a.shape[1], 8):
            exact = total.double() + x[:, k : k + 8].double() @ y[k : k + 8].double()
            total = exact.float()
            if cuts:
                too_large = total.abs().double() > exact.abs()
                total = torch.where(too_large, torch.nextafter(total, torch.zeros_like(total)), total)
    return total


def attention(q, k, v, product, keys=32):
    m, l_sum, out = torch.full((len(q), 1), -math.inf), torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for i in range(0, len(k), keys):
        s = product(q, k[i : i + keys].T.contiguous()) * q.shape[1] ** -0.5
        new = torch.maximum(m, s.amax(1, keepdim=True))
        p, c = torch.exp(s - new), torch.exp(m - new)
        l_sum, out, m = l_sum * c + p.sum(1, keepdim=True), out * c + product(p, v[i : i + keys]), new
    return out / l_sum


def ratio(D, product):
    """The error, in units of what the rule allows: the larger of the maximum's and the RMS error's, of four seeds."""
    errors = {"ours": [], "torch": []}
    top = 0.0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(n, D, generator=generator) for n in (64, 512, 512))
        exact = torch.softmax(q.double() @ k.double().T * D**-0.5, -1) @ v.double()
        top = max(top, exact.abs().max().item())
        errors["ours"].append((attention(q, k, v, product).double() - exact).abs())
        fused = torch.nn.functional.scaled_dot_product_attention(*(x[None, None] for x in (q, k, v)))[0, 0]
        errors["torch"].append((fused.double() - exact).abs())
    most, rms = (
        {n: f(torch.cat(e)).item() for n, e in errors.items()} for f in (torch.max, lambda x: x.square().mean().sqrt())
    )
    ulps = 2 * 2.0 ** (math.floor(math.log2(top)) - 23)
    return max(e["ours"] / (2 * e["torch"] + ulps) for e in (most, rms))


@pytest.mark.parametrize(("D", "least"), [(64, 0.6), (128, 1.0)])
def test_cut_sums_err_more_than_the_rule_allows(D, least):
    exact = ratio(D, torch.matmul)
    rounded = ratio(D, lambda a, b: tf32x3(a, b, cuts=False))
    cut = ratio(D, lambda a, b: tf32x3(a, b, cuts=True))
    assert exact < 0.6 and rounded < 0.8
    assert cut > least and cut > 2 * exact
