"""Exported graphs hold torch's own operators where a program knows none of vdcore's."""

import pytest
import torch
from torch import nn

import vdcore
from vdcore.export import decompositions
from vdcore.ops.choose import OVERLOADS
from vdcore.ops.operator import DECOMPOSE, FUNCTIONS, capture
from vdcore.testing import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decompositions_are_the_reference(case):
    call = capture(FUNCTIONS[case.op], **case.inputs(torch.float64).args)
    values = (*call.tensors(), *call.numbers(), False)
    got = decompositions()[OVERLOADS[call.op]](*values, "auto")
    want = OVERLOADS[call.op](*values, "reference")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Model(nn.Module):
    def forward(self, x, text, lengths):
        out, _ = vdcore.video_attention(
            x, x, x, text=(text, text, text), text_lengths=lengths, mask=vdcore.FrameMask.causal()
        )
        return vdcore.cross_attention(vdcore.temporal_attention(out.view(x.shape), x, x), text, text, lengths=lengths)


def test_lengths_that_are_known_when_the_graph_runs():
    model, x, text = Model(), torch.randn(2, 3, 4, 2, 8), torch.randn(2, 5, 2, 8)
    exported = torch.export.export(model, (x, text, torch.tensor([5, 2])))
    graph = exported.run_decompositions(decompositions())
    assert not any("vdcore" in str(node.target) for node in graph.graph.nodes)
    for lengths in (torch.tensor([5, 2]), torch.tensor([0, 4])):
        torch.testing.assert_close(graph.module()(x, text, lengths), model(x, text, lengths), rtol=1e-5, atol=1e-5)


def test_every_operator_has_one():
    assert set(DECOMPOSE) == set(FUNCTIONS)
