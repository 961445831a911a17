"""The value types: masks against their definition, rope against its formula and against diffusers, views."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vdcore
from vdcore import FrameMask, QKNorm, as_frames, axial_rope
from vdcore.ops.call import mask_numbers
from vdcore.ops.native import native
from vdcore.testing import CASES

numbers = st.one_of(st.none(), st.integers(0, 9))
chunks = st.integers(1, 5)
plain = st.builds(FrameMask, past=numbers, future=numbers, chunk=chunks, sink=st.integers(0, 9))
shots = st.sets(st.integers(0, 30), min_size=1).map(lambda found: tuple(sorted(found)))
with_shots = st.builds(FrameMask, past=numbers, future=numbers, chunk=chunks, shots=shots)
halves = st.builds(FrameMask.teacher_forcing, frames=st.integers(1, 20), chunk=chunks, past=numbers)
masks = st.one_of(plain, with_shots, halves)
sizes = st.integers(0, 14)


def brute_force(mask, T_q, T_k, start):
    """The sentence of the contract, frame by frame."""

    def forced(q, k):
        cq, ck = (x % mask.clean // mask.chunk for x in (q, k))
        near = mask.past is None or ck >= cq - mask.past
        if k >= mask.clean:
            return q >= mask.clean and ck == cq
        return near and (ck < cq if q >= mask.clean else ck <= cq)

    def sees(q, k):
        if mask.clean:
            return forced(q, k)
        own_shot = [shot for shot in mask.shots if shot <= q][-1:]
        cq, ck = q // mask.chunk, k // mask.chunk
        return (mask.future is None or ck <= cq + mask.future) and (
            mask.past is None or ck >= cq - mask.past or k < mask.sink or k in own_shot
        )

    return [[sees(start + q, k) for k in range(T_k)] for q in range(T_q)]


@settings(max_examples=400, deadline=None)
@given(masks, sizes, sizes, st.integers(0, 20))
def test_mask(mask, T_q, T_k, start):
    if mask.clean and max(T_k, start + T_q) > 2 * mask.clean:
        for what in (mask.visible, mask.runs, mask.density):
            with pytest.raises(ValueError, match=rf"must be at most 2 \* clean = {2 * mask.clean}, got (T_k|q_start)"):
                what(T_q, T_k, start)
        start = min(start, 2 * mask.clean)
        T_q, T_k = min(T_q, 2 * mask.clean - start), min(T_k, 2 * mask.clean)
    expected = torch.tensor(brute_force(mask, T_q, T_k, start), dtype=torch.bool).reshape(T_q, T_k)
    assert torch.equal(mask.visible(T_q, T_k, start), expected)

    runs = mask.runs(T_q, T_k, start)
    painted = torch.zeros(T_q, T_k, dtype=torch.bool)
    for row, pairs in zip(painted, runs):
        assert len(pairs) <= 2
        assert all(0 <= a < b <= T_k for a, b in pairs), "clipped and not empty"
        assert all(x[1] < y[0] for x, y in itertools.pairwise(pairs)), "sorted, merged where they touch"
        for a, b in pairs:
            row[a:b] = True
    assert torch.equal(painted, expected)
    assert mask.density(T_q, T_k, start) == (expected.double().mean().item() if expected.numel() else 0.0)

    rows, columns = native().frame_runs(mask_numbers(mask), T_q, T_k, start)
    painted = torch.zeros(T_q, T_k, dtype=torch.bool)
    for row, (low, window) in zip(painted, rows):
        assert low[1] <= max(window[0], low[0])
        row[slice(*low)] = True
        row[slice(*window)] = True
    assert torch.equal(painted, expected), "the engine's runs"
    for column, runs in zip(expected.T, columns):
        seen = torch.cat([torch.arange(begin, max(begin, end)) for begin, end in runs])
        assert torch.equal(column.nonzero().flatten(), seen), "the query frames that see a key"


def test_mask_constructors():
    T = 6
    assert FrameMask.full().visible(T).all()
    assert torch.equal(FrameMask.same_frame().visible(T), torch.eye(T, dtype=torch.bool))
    assert torch.equal(FrameMask.causal().visible(T), torch.ones(T, T, dtype=torch.bool).tril())
    band = torch.ones(T, T, dtype=torch.bool)
    assert torch.equal(FrameMask.symmetric(2).visible(T), band.triu(-2).tril(2))
    assert torch.equal(FrameMask.window(3, 1).visible(T), band.triu(-3).tril(1))
    assert FrameMask.causal().runs(2, q_start=3) == (((0, 4),), ((0, 5),))


def test_teacher_forcing():
    mask = FrameMask.teacher_forcing(4, chunk=2, past=1)
    assert mask == FrameMask(past=1, chunk=2, clean=4)
    clean, noisy = mask.runs(8)[:4], mask.runs(8)[4:]
    assert clean == (((0, 2),), ((0, 2),), ((0, 4),), ((0, 4),))
    assert noisy == (((4, 6),), ((4, 6),), ((0, 2), (6, 8)), ((0, 2), (6, 8)))
    assert FrameMask.teacher_forcing(3, chunk=9).runs(6) == (((0, 3),),) * 3 + (((3, 6),),) * 3


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"clean": -1}, ValueError, "clean must be at least 0, got -1"),
        ({"clean": 2.0}, TypeError, "clean must be an int, got 2.0"),
        ({"clean": 2, "future": 0}, ValueError, "future must be None beside clean=2, got 0"),
        ({"clean": 2, "sink": 1}, ValueError, "sink must be 0 beside clean=2, got 1"),
        ({"clean": 2, "shots": (0,)}, ValueError, r"shots must be \(\) beside clean=2, got \(0,\)"),
        ({"shots": (0,), "sink": 1}, ValueError, "sink must be 0 beside shots, which take its place, got 1"),
        ({"shots": (3, 3)}, ValueError, r"shots must ascend from 0 or above, got \(3, 3\)"),
        ({"shots": (-1, 3)}, ValueError, r"shots must ascend from 0 or above, got \(-1, 3\)"),
        ({"shots": [1, 3]}, TypeError, r"shots must be a tuple of ints, got \[1, 3\]"),
        ({"shots": (1, True)}, TypeError, "shots must be a tuple of ints"),
    ],
)
def test_masks_that_are_none(values, error, message):
    with pytest.raises(error, match=f"FrameMask: {message}"):
        FrameMask(**values)


@pytest.mark.parametrize("frames, error", [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)])
def test_teacher_forcing_of_no_frames(frames, error):
    with pytest.raises(error, match=r"FrameMask.teacher_forcing: frames must be"):
        FrameMask.teacher_forcing(frames)


@pytest.mark.parametrize("op", ["temporal_attention", "video_attention"])
def test_more_frames_than_two_halves(op):
    q = torch.randn(1, 5, 2, 1, 8)
    mask = FrameMask.teacher_forcing(2)
    with pytest.raises(ValueError, match=rf"{op}: mask must be one of teacher forcing over at most 2 \* 2 frames, got"):
        getattr(vdcore, op)(q, q, q, mask=mask)
    with pytest.raises(ValueError, match=r"got q_start \+ T = 5"):
        getattr(vdcore, op)(q[:, :2], q[:, :4], q[:, :4], mask=mask, q_start=3)


def test_huge_numbers():
    """Nothing overflows on the way to the engine."""
    mask = FrameMask(past=10**30, future=10**30, chunk=10**12, sink=10**15)
    q = torch.randn(1, 3, 2, 1, 8)
    torch.testing.assert_close(vdcore.temporal_attention(q, q, q, mask=mask), vdcore.temporal_attention(q, q, q))
    mask = FrameMask(past=10**30, future=0, chunk=1, shots=(0, 10**30))
    torch.testing.assert_close(
        vdcore.temporal_attention(q, q, q, mask=mask), vdcore.temporal_attention(q, q, q, mask=FrameMask.causal())
    )
    mask = FrameMask.teacher_forcing(10**30, 10**12, 10**30)
    torch.testing.assert_close(vdcore.temporal_attention(q, q, q, mask=mask), vdcore.temporal_attention(q, q, q))
    mask = FrameMask(past=0, future=0, chunk=2**40)
    torch.testing.assert_close(vdcore.temporal_attention(q, q, q, mask=mask), vdcore.temporal_attention(q, q, q))


@pytest.mark.parametrize(
    "fps,stride,frames", [(16, 4, 20), (24, 4, 30), (30, 6, 25), (30, 8, 19)], ids=["wan", "hunyuan", "mochi", "ltx"]
)
def test_five_seconds(fps, stride, frames):
    assert FrameMask.seconds(5, fps, stride) == FrameMask(past=frames, future=0)
    assert FrameMask.seconds(0.1 + 0.2, 10).past == 3, "a rounding error is not another frame"


def test_axial_rope_is_a_rotation():
    rope = axial_rope((3, 2, 4), (4, 6, 2), start=2)
    assert rope.cos.shape == (3, 8, 6)
    torch.testing.assert_close(rope.cos.square() + rope.sin.square(), torch.ones(3, 8, 6))
    t, y, x = 1, 1, 3
    angle = torch.atan2(rope.sin, rope.cos)[t, y * 4 + x]
    expected = [2 + t, (2 + t) * 1e4 ** (-2 / 4), y, y * 1e4 ** (-2 / 6), y * 1e4 ** (-4 / 6), x]
    torch.testing.assert_close(angle, torch.tensor([math.remainder(a, 2 * math.pi) for a in expected]))
    assert axial_rope((3, 2, 4), (4, 0, 0)).cos.shape == (3, 1, 2)
    assert axial_rope((3, 2, 4), (0, 2, 2)).cos.shape == (1, 8, 2)


def test_axial_rope_is_diffusers():
    """The table of Wan: 44 channels for the frame, 42 for the row, 42 for the column, interleaved."""
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    hidden = torch.zeros(1, 16, 3, 8, 10)
    cos, sin = WanRotaryPosEmbed(128, (1, 2, 2), 64)(hidden)  # (1, 60, 1, 128), every value twice
    ours = axial_rope((3, 4, 5), (44, 42, 42))
    torch.testing.assert_close(ours.cos.flatten(0, 1), cos[0, :, 0, ::2].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.sin.flatten(0, 1), sin[0, :, 0, 1::2].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_rope_depends_on_distance_only(style):
    q, k = torch.randn(1, 6, 1, 1, 8), torch.randn(1, 1, 1, 1, 8).expand(1, 6, 1, 1, 8)
    rope = axial_rope((6, 1, 1), (8, 0, 0), style=style)
    scores = torch.einsum("btshd,bkshd->tk", rope.rotate(q[:, :1].expand(q.shape)), rope.rotate(k))
    for d in range(-5, 6):
        diagonal = scores.diagonal(d)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(diagonal.shape))


def test_norm_is_torchs():
    x, w, b = torch.randn(2, 3, 4, 2, 16), torch.randn(16), torch.randn(16)
    rms = QKNorm(w, None, eps=1e-5)
    torch.testing.assert_close(rms.q(x), torch.nn.functional.rms_norm(x, (16,), w, 1e-5))
    layer = QKNorm(w, w, "layer", q_bias=b)
    torch.testing.assert_close(layer.q(x), torch.nn.functional.layer_norm(x, (16,), w, b, 1e-6))
    whole = QKNorm(torch.ones(32), None, over="all")
    torch.testing.assert_close(whole.q(x).flatten(-2), torch.nn.functional.rms_norm(x.flatten(-2), (32,), None, 1e-6))


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_as_frames_is_a_view(layout):
    x = torch.randn(2, 12, 3, 8)
    given = x if layout == "BNHD" else x.transpose(1, 2).contiguous()
    frames = as_frames(given, 4, layout)
    assert frames.data_ptr() == given.data_ptr()
    torch.testing.assert_close(frames, x.view(2, 4, 3, 3, 8))
    joint = torch.randn(2, 20, 3, 8)[:, 5:17]  # a slice of a joint sequence
    torch.testing.assert_close(as_frames(joint, 4), joint.reshape(2, 4, 3, 3, 8))


@pytest.mark.parametrize("case", [case for case in CASES if "long" not in case.tags], ids=str)
def test_gradcheck_of_the_reference(case):
    """The oracle's own derivative, against finite differences."""
    inputs = case.inputs(torch.float64, requires_grad=True)

    def function(*values):
        args = copy.deepcopy(inputs.args, {id(x): value for x, value in zip(inputs.leaves.values(), values)})
        result = getattr(vdcore, case.op)(**args, backend="reference")
        flat = torch.cat([y.flatten() for y in _flat(result)])
        return torch.where(flat.isinf(), torch.zeros_like(flat), flat)

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves.values()), fast_mode=True)


def _flat(result):
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in _flat(part)]
