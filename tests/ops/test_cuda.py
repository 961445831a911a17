"""The CUDA kernels, on a GPU or under their emulator: every case, edges of their tiles, what must not be read."""

from dataclasses import replace

import pytest
import torch
from support import HALF

import vdcore
from vdcore import FrameMask, QKNorm, Rope
from vdcore.ops.choose import BACKENDS
from vdcore.ops.cuda import emulated, kernels
from vdcore.testing import LAYOUTS, Case, cases_of, check

cuda = BACKENDS["cuda"]
pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"cuda: {cuda.missing()}")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def check_what_runs(case, dtype, **kwargs):
    """Forward, and backward where there is one; a skip with the reason where the call is not served."""
    for gradients in (True, False):
        inputs = case.inputs(dtype, requires_grad=gradients, device=DEVICE, layout=kwargs.get("layout", "contiguous"))
        reason = dict(vdcore.explain(case.op, **inputs.args))["cuda"]
        if reason is None:
            # Lines are short work for the emulator, and gradients of weights and tables hold few values: all draws.
            every = 4 if emulated() and case.op != "temporal_attention" else 1
            return check(case, "cuda", dtype, gradients=gradients, device=DEVICE, every=every, **kwargs)
    pytest.skip(reason)


# Under the emulator, operators with a backward are tried on their cases beside all other backends, in tests/ops.
HERE = [op for op, implementation in cuda.operators.items() if implementation.backward is None or not emulated()]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", cases_of(*HERE), ids=str)
def test_case(case, dtype):
    check_what_runs(case, dtype)


def qkv(d, *shape, T_k=None, G=None):
    B, T, S, H, D = shape
    kv = (B, T_k or T, S, G or H, D)
    return {"q": d("q", *shape), "k": d("k", *kv), "v": d("v", *kv)}


def norm_of(d, D, kind):
    norm = QKNorm(d("q_weight", D, around=1.0), d("k_weight", D, around=1.0), kind)
    return norm if kind == "rms" else replace(norm, q_bias=d("q_bias", D), k_bias=d("k_bias", D))


def fixed_rope(T, S, pairs):
    """A table that asks for no gradient, so that a backward kernel takes the turn back on its way."""
    angle = torch.randn(T, S, pairs, generator=torch.Generator("cpu").manual_seed(3), device="cpu")
    return Rope(angle.cos().to(DEVICE), angle.sin().to(DEVICE))


# Edges of the tiles of 8 and 16 frames, and of the kernels for 16 and 32 keys and for more.
@pytest.mark.parametrize("mask", [FrameMask(), FrameMask(past=3, future=2, chunk=2, sink=3)], ids=["full", "runs"])
@pytest.mark.parametrize(
    "T,T_k", [(1, 1), (7, 8), (8, 9), (9, 3), (16, 17), (17, 16), (32, 33), (40, 9), (65, 66), (5, 129)]
)
def test_frames(T, T_k, mask):
    def build(d):
        return {**qkv(d, 1, T, 3, 1, 24, T_k=T_k), "mask": mask, "return_lse": True}

    check_what_runs(Case("temporal_attention", f"{T} x {T_k} frames", build), torch.bfloat16)


# Every pair of mask, dtype, channels (one, two and three loops of products and part of another) and norm with rope.
@pytest.mark.parametrize(
    "T,D,mask,dtype,moved",
    [
        (33, 24, FrameMask.causal(), torch.bfloat16, "rms"),
        (48, 72, FrameMask(past=5, future=0, sink=2), torch.float16, "layer"),
        (63, 128, FrameMask(future=0, chunk=4), torch.float16, None),
        (100, 88, FrameMask(), torch.bfloat16, None),
        (127, 40, FrameMask.window(9, 2), torch.bfloat16, "layer"),
        (160, 104, FrameMask(past=2, future=1, chunk=3, sink=40), torch.bfloat16, None),
        (256, 16, FrameMask.window(20), torch.float16, "rms"),
    ],
    ids=str,
)
def test_long_lines(T, D, mask, dtype, moved):
    """More than 32 frames, some of them padding: sums of 16 keys at a time."""

    def build(d):
        more = {"norm": norm_of(d, D, moved), "rope": fixed_rope(T, 1, 8)} if moved else {}
        return {**qkv(d, 2, T, 1, 1, D), "mask": mask, "lengths": d.integers(T - 3, T // 2), "return_lse": True, **more}

    check_what_runs(Case("temporal_attention", f"{T} x {D}, {mask}", build), dtype)


def test_most_frames():
    """Every warp of the backward has two tiles of rows."""

    def build(d):
        return {**qkv(d, 1, 140, 1, 1, 8, T_k=256), "mask": FrameMask.window(150)}

    check_what_runs(Case("temporal_attention", "140 x 256 frames", build), torch.bfloat16)


def test_scores_that_grow_along_a_line():
    """The online softmax: sums of early keys all but vanish under late ones, and what they hold must go with them."""
    T = 64
    q, v = torch.ones(1, T, 1, 1, 16).bfloat16(), torch.randn(1, T, 1, 1, 16).bfloat16()
    k = (torch.arange(T) - T / 2).view(1, T, 1, 1, 1).expand(q.shape).bfloat16()
    for keys in (k, -k):
        out, lse = vdcore.temporal_attention(q, keys, v, return_lse=True, backend="cuda")
        expected, expected_lse = vdcore.temporal_attention(
            *(x.double() for x in (q, keys, v)), return_lse=True, backend="reference"
        )
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-5, atol=1e-5)


# In the short kernel two warps a line; in the long one a long line, shared keys, wide heads.
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("T,H,G,D", [(32, 2, 2, 72), (128, 1, 1, 24), (24, 4, 1, 40), (16, 2, 2, 160)])
def test_gradients_of_inputs_with_a_mean(T, H, G, D, dtype):
    """An error of delta is one of all score gradients of a row: where keys have a mean it adds up in dq.

    With delta from the rounded output, dq of 128 frames was at 1.3 times what the rule allows in bfloat16, and at 2.1
    in float16; from P and dP at 0.02.
    """

    def build(d):
        return {n: d(n, 1, T, 4, heads, D, around=2.0, spread=0.3) for n, heads in zip("qkv", (H, G, G))}

    check_what_runs(Case("temporal_attention", f"{T} x {D}, {H} of {G}, around 2", build), dtype)


@pytest.mark.parametrize("lengths", [(-1, 3), (-(2**32) + 2, 5)], ids=str)
@pytest.mark.parametrize(
    "op,T", [("temporal_attention", 6), ("temporal_attention", 40), ("video_attention", 6), ("gated_attention", 6)]
)
def test_a_negative_length_is_0(op, T, lengths):
    tensors = [torch.randn(2, T, 3, 2, 16).bfloat16() for _ in "qkv"]

    def run(*lengths):
        options = {"lengths": torch.tensor(lengths), "backend": "cuda"}
        if op == "gated_attention":
            return [vdcore.gated_attention(tensors, tensors, torch.tensor(0.3), **options)]
        leaves = [x.clone().requires_grad_(op == "temporal_attention") for x in tensors]
        out, lse = getattr(vdcore, op)(*leaves, return_lse=True, **options)
        assert lse[0].eq(-torch.inf).all()
        return [out, lse, *(grads_of(out, leaves) if op == "temporal_attention" else [])]

    found = run(*lengths)
    assert found[0][0].eq(0).all() and found[0][1].ne(0).any()
    for ours, expected in zip(found, run(0, *lengths[1:])):
        assert torch.equal(ours, expected)


# Every head dim, and every kernel once: two lines a tile, 32 keys, a long line; 64, 96, 128 and 256 channels.
HEAD_DIMS = {8: (8, 72, 104, 160), 20: (40, 80, 128, 256), 40: (64, 96, 104, 128)}


@pytest.mark.parametrize("T,D", [(T, D) for T, dims in HEAD_DIMS.items() for D in dims])
def test_head_dims(T, D):
    def build(d):
        return {**qkv(d, 1, T, 1, 2, D), "mask": FrameMask.causal()}

    check_what_runs(Case("temporal_attention", f"{T} x {D}", build), torch.float16)


@pytest.mark.parametrize("D", [8, 40, 72, 128])
def test_gated_head_dims(D):
    """Tokens that fill one tile of queries and keys and part of another."""

    def build(d):
        triples = [tuple(qkv(d, 1, 2, 70, 1, D).values()), tuple(d(f"temporal_{n}", 1, 2, 70, 1, D) for n in "qkv")]
        return {"spatial": triples[0], "temporal": triples[1], "gate": d("gate", D, around=0.5, spread=0.2)}

    check_what_runs(Case("gated_attention", f"70 x {D}", build), torch.bfloat16)


@pytest.mark.parametrize("T", [6, 12, 25])
@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_and_rope(kind, style, T):
    """On the way where pairs are neighbours, else before; a table for every token, and one for none."""

    def build(d):
        norm = QKNorm(d("q_weight", 40, around=1.0), d("k_weight", 40, around=1.0), kind)
        if kind == "layer":
            norm = replace(norm, q_bias=d("q_bias", 40), k_bias=d("k_bias", 40))
        angle = torch.randn(T, 3 if kind == "rms" else 1, 16, generator=d.generator, dtype=torch.float64, device="cpu")
        rope = Rope(d.leaf("cos", angle.cos(), torch.float32), d.leaf("sin", angle.sin(), torch.float32), style)
        return {**qkv(d, 2, T, 3, 2, 40), "norm": norm, "rope": rope, "mask": FrameMask.window(4)}

    check_what_runs(Case("temporal_attention", f"{kind} {style} {T}", build), torch.bfloat16)


@pytest.mark.parametrize("T", [12, 25, 40])
@pytest.mark.parametrize("moved", ["norm", "rope", "part of the channels", "heads"])
def test_norm_or_rope_alone(moved, T):
    """Fused kernels read a table of all channels: where there is none, or of fewer pairs, it is filled up."""

    def build(d):
        given = {**qkv(d, 2, T, 2, 2, 40), "mask": FrameMask.causal()}
        if moved == "norm":
            return {**given, "norm": QKNorm(None, d("k_weight", 40, around=1.0))}
        if moved == "heads":
            angle = torch.randn(T, 1, 2, 20, generator=torch.Generator("cpu").manual_seed(5), device="cpu")
            return {**given, "rope": Rope(angle.cos().to(DEVICE), angle.sin().to(DEVICE))}
        return {**given, "rope": fixed_rope(T, 2, 20 if moved == "rope" else 8)}

    check_what_runs(Case("temporal_attention", f"{moved} of {T}", build), torch.bfloat16)


@pytest.mark.parametrize("T,T_k", [(17, 17), (32, 20), (18, 32)])
def test_staged_keys_of_an_odd_number_of_sequences(T, T_k):
    """Two warps without a sequence in the last block: each stages its own half all the same."""

    def build(d):
        given = {"q": d("q", 1, T, 3, 1, 40), "k": d("k", 1, T_k, 3, 1, 40), "v": d("v", 1, T_k, 3, 1, 40)}
        return {**given, "norm": QKNorm(d("q_weight", 40, around=1.0), None)}

    check_what_runs(Case("temporal_attention", f"{T} frames of {T_k}", build), torch.bfloat16)


# In the short kernel: two lines a tile, one, two warps a line. In the long one: long, wide or shared.
@pytest.mark.parametrize(
    "T,T_k,H,G,D",
    [
        (6, 6, 3, 3, 40),
        (12, 16, 2, 2, 72),
        (25, 25, 2, 2, 128),
        (40, 35, 2, 2, 40),
        (9, 20, 6, 2, 72),
        (140, 70, 1, 1, 24),
    ],
)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fused_norm_rope_backward(T, T_k, H, G, D, kind):
    def build(d):
        rope = fixed_rope(max(T, T_k) + 2, 2 if kind == "rms" else 1, 12)
        mask = FrameMask.window(7, 2) if T_k != T else FrameMask()
        return {
            **qkv(d, 1, T, 2, H, D, T_k=T_k, G=G),
            "norm": norm_of(d, D, kind),
            "rope": rope,
            "mask": mask,
            "q_start": 2,
            "lengths": d.integers(T_k - 1),
            "return_lse": True,
        }

    check_what_runs(Case("temporal_attention", f"{T} x {T_k} x {D}, {H} of {G}, {kind}", build), torch.bfloat16)


@pytest.mark.parametrize("T,H,G,D", [(5, 4, 2, 24), (18, 3, 1, 80), (12, 2, 1, 160), (66, 2, 1, 24)])
def test_shared_keys(T, H, G, D):
    def build(d):
        return {**qkv(d, 2, T, 1, H, D, G=G), "mask": FrameMask.causal(), "return_lse": True}

    check_what_runs(Case("temporal_attention", f"{T} x {D}, {H} of {G}", build), torch.float16)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("case", cases_of("temporal_attention", "gated_attention", tag="plain"), ids=str)
def test_layout(case, layout):
    check_what_runs(case, torch.bfloat16, layout=layout)


def incoming(out):
    return torch.randn(out.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(out)


def grads_of(out, leaves):
    return torch.autograd.grad(out, leaves, incoming(out.detach()))


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("T", [7, 9, 30, 70])
@pytest.mark.parametrize("mask", [FrameMask.causal(), FrameMask(past=1, future=0, sink=1)], ids=str)
def test_hidden_frames(T, mask, name):
    """Hazard 11: a NaN reaches exactly what sees it; two positions that share a tile do not see one another."""
    bad = 4
    tensors = {n: torch.randn(1, T, 3, 1, 16).bfloat16() for n in "qkv"}
    results = []
    for poison in (False, True):
        leaves = {n: x.clone() for n, x in tensors.items()}
        if poison:
            leaves[name][0, bad, 1] = torch.nan
        leaves = [x.requires_grad_() for x in leaves.values()]
        out = vdcore.temporal_attention(*leaves, mask=mask, backend="cuda")
        results.append([out, *grads_of(out, leaves)])
    clean, poisoned = results
    for ours, expected in zip(poisoned, clean):
        assert torch.equal(ours[:, :, [0, 2]], expected[:, :, [0, 2]]), "other positions"
    sees = mask.visible(T)
    hit = sees[:, bad] if name != "q" else torch.arange(T) == bad
    assert poisoned[0][0, hit, 1].isnan().all()
    assert torch.equal(poisoned[0][0, ~hit], clean[0][0, ~hit])
    assert torch.equal(poisoned[1][0, ~hit], clean[1][0, ~hit])
    untouched = ~sees[hit].any(0)
    for i in (2, 3):
        assert torch.equal(poisoned[i][0, untouched], clean[i][0, untouched])


@pytest.mark.parametrize("T", [7, 30, 70])
def test_a_nan_of_a_hidden_frame_stays_out_of_rows_that_see_another(T):
    """Hazard 11, channel by channel: a row that sees one NaN is not spoilt by the hidden one in another channel."""
    q, k, v = (torch.randn(1, T, 3, 1, 40).bfloat16() for _ in "qkv")
    results = []
    for poison in (False, True):
        if poison:
            v[0, 1, :, 0, 3], v[0, 5, :, 0, 37] = torch.nan, torch.inf
        results.append(vdcore.temporal_attention(q, k, v, mask=FrameMask.causal(), backend="cuda"))
    clean, poisoned = results
    assert poisoned[0, 1:, ..., 3].isnan().all() and poisoned[0, 5:, ..., 37].isinf().all()
    expected = clean.clone()
    expected[0, 1:, ..., 3], expected[0, 5:, ..., 37] = torch.nan, torch.inf
    assert torch.equal(poisoned.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("T,moved", [(7, False), (7, True), (40, True)])
def test_padded_frames_of_any_content(T, moved):
    """Hazards 10, 11: NaN past the lengths, in inputs and in the incoming gradient; norm and rope on the way."""
    lengths = torch.tensor([4, 0])
    results = []
    for filler in (0.5, torch.nan):
        torch.manual_seed(0)
        tensors = [torch.randn(2, T, 3, 2, 16).bfloat16() for _ in range(4)]
        for x in tensors:
            x[0, 4:], x[1] = filler, filler
        leaves = [x.requires_grad_() for x in tensors[:3]]
        how = {}
        if moved:
            leaves += [torch.ones(16).requires_grad_() for _ in range(2)]
            how = {"norm": QKNorm(*leaves[3:]), "rope": fixed_rope(T, 1, 8)}
        out, lse = vdcore.temporal_attention(*leaves[:3], lengths=lengths, return_lse=True, backend="cuda", **how)
        results.append([out, lse, *torch.autograd.grad(out, leaves, tensors[3])])
    for a, b in zip(*results):
        assert torch.equal(a, b)
    out, lse = results[1][:2]
    assert out[0, 4:].eq(0).all() and out[1].eq(0).all() and out[0, :4].ne(0).any()
    assert lse[1].eq(-torch.inf).all() and all(dx[1].eq(0).all() for dx in results[1][2:5])


def test_a_query_that_sees_no_key():
    q, k, v = (torch.randn(1, 6, 3, 2, 16).bfloat16().requires_grad_() for _ in range(3))
    out, lse = vdcore.temporal_attention(q, k, v, q_start=30, mask=FrameMask.window(3), return_lse=True, backend="cuda")
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    assert all(dx.eq(0).all() for dx in grads_of(out, [q, k, v]))


@pytest.fixture
def edges_of_grids():
    """The emulator runs the first and the last blocks of a large grid: numbering goes wrong there, if anywhere."""
    if emulated():
        kernels().set_edges(4)
    yield
    if emulated():
        kernels().set_edges(0)


@pytest.mark.parametrize("B,S,H", [(1, 65_537, 1), (70_000, 1, 1), (1, 1, 70_000)])
def test_many_sequences(B, S, H, edges_of_grids):
    """Hazard 1."""
    leaves = [torch.randn(B, 4, S, H, 8).bfloat16().requires_grad_() for _ in range(3)]
    out = vdcore.temporal_attention(*leaves, mask=FrameMask.causal(), backend="cuda")
    found = [out, *grads_of(out, leaves)]
    dout = incoming(out.detach())
    for b, s, h in ((0, 0, 0), (B - 1, S - 1, H - 1)):
        at = (slice(b, b + 1), slice(None), slice(s, s + 1), slice(h, h + 1))
        some = [x[at].detach().float().requires_grad_() for x in leaves]
        expected = vdcore.temporal_attention(*some, mask=FrameMask.causal(), backend="reference")
        expected = [expected, *torch.autograd.grad(expected, some, dout[at].float())]
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours[at].float(), theirs, rtol=3e-2, atol=3e-2)


@pytest.mark.skipif(not emulated(), reason="the order of warps is the emulator's")
@pytest.mark.parametrize("op", ["temporal_attention", "gated_attention"])
def test_every_order_of_warps(op):
    """The same bits, whichever warps and lanes come first: a barrier that is missing shows."""
    results = set()
    for order, seed in (("forward", 0), ("backward", 0), ("random", 1), ("random", 2)):
        torch.manual_seed(0)
        leaves = [torch.randn(1, 30, 70, 1, 24).bfloat16() for _ in range(3)]
        kernels().set_order(order, seed)
        try:
            if op == "gated_attention":
                found = [vdcore.gated_attention(leaves, leaves, torch.tensor(0.3), backend="cuda")]
            else:
                leaves = [x.requires_grad_() for x in leaves]
                out = vdcore.temporal_attention(*leaves, mask=FrameMask.window(8), backend="cuda")
                found = [out, *grads_of(out, leaves)]
        finally:
            kernels().set_order("forward", 0)
        results.add(tuple(x.detach().contiguous().view(torch.int16).numpy().tobytes() for x in found))
    assert len(results) == 1


def test_what_is_refused():
    q, wide = torch.randn(1, 4, 3, 2, 24).bfloat16(), torch.randn(1, 40, 1, 1, 160).bfloat16()
    for args, reason in (
        ({"q": q.float(), "k": q.float(), "v": q.float()}, "float32"),
        ({"q": q[..., :20], "k": q[..., :20], "v": q[..., :20]}, "multiple of 8"),
        ({"q": torch.randn(1, 4, 3, 2, 28).bfloat16()[..., :24], "k": q, "v": q}, "16 bytes"),
        ({"q": q, "k": q.expand(1, 4, 3, 2, 24)[:, [0] * 257], "v": q[:, [0] * 257]}, "key frames"),
        ({"q": wide, "k": wide[:, :9], "v": wide[:, :9]}, "32 query and key frames beyond 128 channels; got 40 and 9"),
        ({"q": q, "k": q, "v": q, "norm": QKNorm(torch.ones(48), torch.ones(48), over="all")}, "all heads"),
    ):
        with pytest.raises(vdcore.BackendError, match=reason):
            vdcore.temporal_attention(**args, backend="cuda")
    q = torch.randn(1, 256, 1, 4, 72).bfloat16().requires_grad_()
    with pytest.raises(vdcore.BackendError, match="227 KiB"):
        vdcore.temporal_attention(q, q[:, :, :, :1], q[:, :, :, :1], backend="cuda")
