"""The native engine's groups of tokens against the definition of the mask, from both sides."""

import itertools

import pytest
import torch

from vdcore import FrameMask
from vdcore.ops.call import mask_numbers
from vdcore.ops.native import missing as why_no_native
from vdcore.ops.native import native

pytestmark = pytest.mark.skipif(why_no_native() is not None, reason=str(why_no_native()))

MASKS = [
    FrameMask.full(),
    FrameMask.same_frame(),
    FrameMask.causal(),
    FrameMask.window(2, 1),
    FrameMask(past=1, future=0, chunk=2),
    FrameMask(past=1, future=0, sink=1),
    FrameMask(past=0, future=1, chunk=3, sink=2),
    FrameMask(past=1, future=0, shots=(1, 3)),
    FrameMask(past=0, future=0, chunk=2, shots=(0, 5, 7)),
    FrameMask.teacher_forcing(6),
    FrameMask.teacher_forcing(6, past=1),
    FrameMask.teacher_forcing(6, chunk=2, past=0),
    FrameMask.teacher_forcing(7, chunk=3, past=1),
]


def pairs(groups, rows, columns, video_rows, video_columns):
    """``(samples, rows, columns)``: what the groups say sees what; every row in exactly one group."""
    samples = 1 + max(sample for sample, _, _ in groups)
    seen, owner = torch.zeros(samples, rows, columns, dtype=torch.bool), torch.zeros(samples, rows, dtype=torch.int)
    for sample, (text, begin, end), runs in groups:
        own = slice(begin + video_rows * text, end + video_rows * text)
        owner[sample, own] += 1
        for run_text, run_begin, run_end in runs:
            assert run_begin < run_end
            seen[sample, own, run_begin + video_columns * run_text : run_end + video_columns * run_text] = True
    assert (owner == 1).all()
    return seen


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("T, T_k, q_start", [(5, 5, 0), (2, 6, 4), (6, 3, 0), (3, 4, 9)])
def test_frames(mask, T, T_k, q_start):
    S, L, B = 3, 2, 2
    for lengths, text_lengths, sees_video in itertools.product((None, [2, 7]), (None, [0, 2]), (True, False)):
        groups = native().frame_groups(
            *(mask_numbers(mask), B, T, T_k, S, q_start, lengths, L, text_lengths, sees_video),
        )
        expected = torch.zeros(B, T * S + L, T_k * S + L, dtype=torch.bool)
        for b in range(B):
            valid = T_k if lengths is None else min(lengths[b], T_k)
            alive = T if lengths is None else max(0, min(lengths[b] - q_start, T))
            text = L if text_lengths is None else text_lengths[b]
            frames = mask.visible(T, T_k, q_start).clone()
            frames[alive:], frames[:, valid:] = False, False
            expected[b, : T * S, : T_k * S] = frames.repeat_interleave(S, 0).repeat_interleave(S, 1)
            expected[b, : alive * S, T_k * S : T_k * S + text] = True
            expected[b, T * S : T * S + text, T_k * S : T_k * S + text] = True
            if sees_video:
                expected[b, T * S : T * S + text, : valid * S] = True
        assert torch.equal(pairs(groups.queries, T * S + L, T_k * S + L, T * S, T_k * S), expected)
        assert torch.equal(pairs(groups.keys, T_k * S + L, T * S + L, T_k * S, T * S), expected.mT)


def test_prompts():
    groups = native().prompt_groups(2, 3, 2, 5, True, [5, 0, 2, 1, 5, 3])
    expected = torch.zeros(2, 6, 15, dtype=torch.bool)
    for (b, t), n in zip(itertools.product(range(2), range(3)), [5, 0, 2, 1, 5, 3]):
        expected[b, 2 * t : 2 * t + 2, 5 * t : 5 * t + n] = True
    assert torch.equal(pairs(groups.queries, 6, 15, 0, 0), expected)
    assert torch.equal(pairs(groups.keys, 15, 6, 0, 0), expected.mT)


@pytest.mark.parametrize(
    "mask, components",
    [(FrameMask.same_frame(), 4), (FrameMask.full(), 1), (FrameMask.window(1), 1), (FrameMask(0, 0, chunk=2), 2)],
    ids=str,
)
def test_components(mask, components):
    groups = native().frame_groups(mask_numbers(mask), 3, 4, 4, 5, 0, None, 0, None, True)
    assert groups.components == 3 * components
    assert groups.largest_component == 20 // components
    joined = native().frame_groups(mask_numbers(mask), 3, 4, 4, 5, 0, None, 2, None, True)
    assert joined.components == 3 and joined.largest_component == 22


@pytest.mark.parametrize("T, T_k, q_start", [(8, 8, 0), (4, 8, 4), (3, 6, 2), (4, 4, 0)])
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("past", [None, 0, 1])
def test_components_of_teacher_forcing(T, T_k, q_start, chunk, past):
    """Backward holds one component at a time: queries that share a key are in one."""
    mask = FrameMask.teacher_forcing(4, chunk, past)
    groups = native().frame_groups(mask_numbers(mask), 1, T, T_k, 1, q_start, None, 0, None, True)
    seen = mask.visible(T, T_k, q_start).double()
    joined = torch.linalg.matrix_power(seen @ seen.T, T) > 0
    sizes = [int(row.sum()) for row in joined.unique(dim=0) if row.any()]
    assert groups.largest_component >= max(sizes)
    if past == 0:
        assert groups.largest_component == max(sizes), "chunks have nothing to do with one another"
