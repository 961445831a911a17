"""What the time of a call goes to: every event has its part, and the parts are the whole call."""

import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vdcore
from vdcore_bench.measure import parts
from vdcore_bench.measure.parts import breakdown


def test_operators_have_their_part():
    x, w, images, filters = (torch.randn(*n) for n in ((64, 64), (64, 64), (1, 3, 8, 8), (3, 3, 3, 3)))

    def call():
        F.layer_norm(x @ w, (64,))
        F.conv2d(images, filters)
        return torch.cat((x, w)) * 2

    found = breakdown(call, rounds=1).groups
    assert set(found) == set(parts.PARTS) and found[parts.ATTENTION] == found[parts.ACTIVATIONS] == 0
    for name in (parts.PRODUCTS, parts.NORMS, parts.CONVOLUTIONS, parts.COPIES, parts.ELEMENTS, parts.REST):
        assert found[name] > 0, name


def test_products_inside_of_attention_are_attention():
    q = torch.randn(1, 2, 32, 16)
    with sdpa_kernel(SDPBackend.MATH):
        found = breakdown(lambda: F.scaled_dot_product_attention(q, q, q), rounds=1).groups
    assert found[parts.ATTENTION] > 0 and found[parts.PRODUCTS] == 0


def test_our_operators_have_their_part():
    q, vector = torch.randn(1, 4, 6, 2, 16), torch.randn(1, 32)

    def call():
        vdcore.modulate(q.flatten(3), vector, vector)
        return vdcore.temporal_attention(q, q, q)

    found = breakdown(call, rounds=1).groups
    assert found[parts.ATTENTION] > 0 and found[parts.NORMS] > 0 and found[parts.PRODUCTS] == 0


def test_a_gate_of_an_activation_belongs_to_it():
    x = torch.randn(32, 64)
    found = breakdown(lambda: F.gelu(x) * x, rounds=1).groups
    assert found[parts.ACTIVATIONS] > 0 and found[parts.ELEMENTS] == 0


def test_what_is_between_operators_is_the_rest():
    x = torch.randn(8)

    def call():
        time.sleep(0.02)
        return x + 1

    found = breakdown(call, rounds=2, warm=True)
    assert found.groups[parts.REST] >= 19 and found.total > found.groups[parts.REST]
