"""Hopper's frame attention under the emulator: every plan, runs around the edges of its tiles, what must not leak."""

import pytest
import torch
from test_cuda import check_what_runs, qkv

import vdcore
from vdcore import FrameMask
from vdcore.ops.choose import BACKENDS
from vdcore.ops.cuda import emulated, kernels
from vdcore.ops.frame_attention.cuda import run_forward
from vdcore.ops.operator import capture
from vdcore.testing import LAYOUTS, Case, cases_of

cuda = BACKENDS["cuda"]
pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"cuda: {cuda.missing()}")


def device():
    return "cpu" if emulated() else "cuda"


def randn(*shape):
    return torch.randn(*shape).bfloat16().to(device())


@pytest.mark.parametrize("D", [8, 40, 64, 72, 80, 88, 96, 104, 128])
def test_head_dims(D):
    """A frame of one tile of keys and part of another, in every plan."""
    check_what_runs(Case("spatial_attention", f"{D}", lambda d: qkv(d, 1, 2, 201, 1, D)), torch.float16)


@pytest.mark.parametrize("S", [44, 88, 128, 129])
@pytest.mark.parametrize("mask", [FrameMask(), FrameMask(past=1, future=0, chunk=2, sink=1)], ids=["full", "runs"])
def test_runs_and_tiles(S, mask):
    """Runs that end with a tile of 128 or 176 keys, and with part of one."""

    def build(d):
        return {**qkv(d, 1, 5, S, 2, 128, G=1), "mask": mask, "return_lse": True}

    check_what_runs(Case("video_attention", f"{S}", build), torch.bfloat16)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("case", cases_of("spatial_attention", "video_attention", tag="plain"), ids=str)
def test_layout(case, layout):
    check_what_runs(case, torch.bfloat16, layout=layout)


def with_gaps(x):
    """Each frame followed by a token of NaN: frames do not follow one another."""
    whole = torch.full((*x.shape[:2], x.shape[2] + 1, *x.shape[3:]), torch.nan, dtype=x.dtype, device=x.device)
    whole[:, :, :-1] = x
    return whole[:, :, :-1]


@pytest.mark.parametrize("which", ["qkv", "q", "v"])
def test_frames_with_gaps_between_them(which):
    tensors = {name: randn(1, 4, 70, 2, 64) for name in "qkv"}
    args = {"mask": FrameMask.window(1), "backend": "cuda"}
    expected = vdcore.video_attention(*tensors.values(), **args)
    apart = [with_gaps(x) if name in which else x for name, x in tensors.items()]
    torch.testing.assert_close(vdcore.video_attention(*apart, **args), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mask", [FrameMask.same_frame(), FrameMask(past=1, future=0, sink=1)], ids=["same", "window"])
@pytest.mark.parametrize("name", "qkv")
def test_hidden_frames(mask, name):
    """Hazard 11: frames of NaN reach what sees them, and nothing else; tiles of keys are larger than frames."""
    T, S, bad = 5, 30, 2
    tensors = {n: randn(1, T, S, 1, 64) for n in "qkv"}
    clean = vdcore.video_attention(*tensors.values(), mask=mask, backend="cuda")
    tensors[name][:, bad] = torch.nan
    poisoned = vdcore.video_attention(*tensors.values(), mask=mask, backend="cuda")
    hit = mask.visible(T)[:, bad] if name != "q" else torch.arange(T) == bad
    assert poisoned[:, hit].isnan().all()
    assert torch.equal(poisoned[:, ~hit], clean[:, ~hit])


@pytest.mark.parametrize("D,L", [(64, 20), (128, 130)], ids=["blocks", "clusters"])
def test_padding_of_any_content(D, L):
    """Hazards 10, 11: NaN past the lengths of video and text; clusters of which one block has nothing to do, too."""
    results = []
    for filler in (0.5, torch.nan):
        torch.manual_seed(0)
        video, text = ([randn(2, *shape, 1, D) for _ in "qkv"] for shape in ((3, 50), (L,)))
        for x in video:
            x[0, 2:] = x[1] = filler
        for x in text:
            x[0, 13:] = x[1] = filler
        lengths, text_lengths = (torch.tensor(n, device=device()) for n in ([2, 0], [13, 0]))
        (out, out_text), (lse, lse_text) = vdcore.video_attention(
            *video, text=tuple(text), lengths=lengths, text_lengths=text_lengths, return_lse=True, backend="cuda"
        )
        results.append([out, out_text, lse, lse_text])
    for a, b in zip(*results):
        assert torch.equal(a, b)
    out, out_text, lse, lse_text = results[1]
    assert out[0, 2:].eq(0).all() and out[1].eq(0).all() and out_text[0, 13:].eq(0).all() and out_text[1].eq(0).all()
    assert out[0, :2].ne(0).any() and lse[1].eq(-torch.inf).all() and lse_text[1].eq(-torch.inf).all()


@pytest.mark.skipif(not emulated(), reason="the order of warps is the emulator's")
@pytest.mark.parametrize("D", [72, 128], ids=["blocks", "clusters"])
def test_every_order_of_warps(D):
    """The same bits, whichever warps come first and whenever copies and products are done."""
    q, k, v = (randn(1, 3, 150, 1, D) for _ in range(3))
    results = set()
    for order, seed in (("forward", 0), ("backward", 0), ("random", 1), ("random", 2), ("random", 3)):
        kernels().set_order(order, seed)
        try:
            out = vdcore.video_attention(q, k, v, backend="cuda")
        finally:
            kernels().set_order("forward", 0)
        results.add(out.view(torch.int16).numpy().tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("gate_shape", [(1, 1, 1, 1, 1), (1, 2, 70, 1, 1), (1, 1, 1, 2, 72)], ids=str)
def test_gate_in_the_epilogue(gate_shape):
    """out = gate * result + (1 - gate) * out, and the result itself beside it."""
    q, k, v = (randn(1, 2, 70, 2, 72) for _ in range(3))
    gate, other = torch.rand(gate_shape).to(device()), randn(1, 2, 70, 2, 72)
    call = capture(vdcore.spatial_attention, q, k, v)
    result, _ = cuda.operators["spatial_attention"].forward(call)
    out, kept = other.flatten(1, 2).clone(), torch.empty_like(result)
    run_forward(call, out, None, spatial=kept, gate=gate.expand(other.shape))
    assert torch.equal(kept, result)
    mixed = gate * result.unflatten(1, (2, 70)).float() + (1 - gate) * other.float()
    torch.testing.assert_close(out.unflatten(1, (2, 70)).float(), mixed, rtol=1e-2, atol=1e-2)


def test_what_is_refused():
    q = randn(1, 2, 30, 2, 64)
    for args, reason in (
        ({"q": q.float(), "k": q.float(), "v": q.float()}, "float32"),
        ({"q": randn(1, 2, 30, 2, 136), "k": None, "v": None}, "at most 128"),
        ({"q": q, "k": q[:, :, :, :1].expand_as(q), "v": q}, "k is expanded"),
        ({"q": q, "k": q, "v": randn(1, 2, 30, 2, 68)[..., :64]}, "16 bytes"),
    ):
        if args["k"] is None:
            args["k"] = args["v"] = args["q"]
        assert reason in dict(vdcore.explain("video_attention", **args))["cuda"]
