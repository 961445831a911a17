"""The error beside the time: what a provider computed at full size, against the float64 reference on a piece of it.

A piece is independent of the rest (a few positions of temporal attention, one head of video attention), so the slice of
the full result must equal the result of the slice. The rule is that of vdcore.testing: fine up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore.testing import TORCH_FORMS, error_ratio
from vdcore_bench.jobs.base import Job, Tensors, cut
from vdcore_bench.measure import machine
from vdcore_bench.peers.adapter import scores


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


def incoming(outputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the outputs: random, contiguous, the same for every provider."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.empty(y.shape, dtype=y.dtype, device=y.device).normal_(generator=generator) for y in outputs]


def gradients(outputs: list[Tensor], leaves: list[Tensor], dout: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(outputs, leaves, dout, allow_unused=True)
    return [torch.zeros_like(x) if dx is None else dx for x, dx in zip(leaves, found)]


class Judge:
    """Judges every provider of one job; the reference runs once.

    Args:
        tensors: the job's inputs, which all providers get.
    """

    def __init__(self, job: Job, tensors: Tensors) -> None:
        self.job, self.cuts = job, job.cuts()
        self.names = [name for name in tensors if name in self.cuts.gradients] if job.has_backward else []
        self._piece = {name: cut(x.detach(), self.cuts.tensors.get(name, {})) for name, x in tensors.items()}
        # PyTorch's naive form is part of the rule, and holds all scores of the piece three times over.
        self.need = 3 * job.dtype.itemsize * scores(job) // job.shape.H if job.op == "video_attention" else 0
        self.most = machine.memory_limit(job.device)
        self._exact: tuple[list[Tensor], list[Tensor]] | None = None
        self._forms: list[tuple[list[Tensor], list[Tensor]]] = []

    @property
    def note(self) -> str:
        """What the ratio leaves out."""
        if self.need > self.most:
            return f"no error: the naive form of one head needs {machine.bytes_text(self.need)}"
        if self.job.has_backward and not self.names:
            return "error of the outputs only: the float64 gradients would not fit"
        return ""

    def ratio(self, outputs: list[Tensor], dout: list[Tensor], found: Tensors) -> float | None:
        """The worst error ratio of the outputs and of the gradients that the piece determines; None if unknown."""
        if self.need > self.most:
            return None
        if self._exact is None:
            self._solve(dout)
        assert self._exact is not None
        exact, exact_gradients = self._exact
        worst = 0.0
        for i, (y, cuts) in enumerate(zip(outputs, self.cuts.outputs)):
            forms = [form[i] for form, _ in self._forms]
            worst = max(worst, _ratio(cut(y.detach(), cuts), exact[i], forms))
        for i, name in enumerate(self.names):
            forms = [form[i] for _, form in self._forms]
            piece = cut(found[name], self.cuts.tensors.get(name, {}))
            worst = max(worst, _ratio(piece, exact_gradients[i], forms, gradient=True))
        return worst

    def _solve(self, dout: list[Tensor]) -> None:
        pieces = [cut(dy, cuts) for dy, cuts in zip(dout, self.cuts.outputs)]

        def reference(**kwargs: Any) -> Any:
            return getattr(vdcore, self.job.op)(**kwargs, backend="reference")

        self._exact = self._run(reference, pieces, torch.float64)
        self._forms = [self._run(form, pieces, self.job.dtype) for form in TORCH_FORMS[self.job.op].values()]

    def _run(
        self, function: Callable[..., Any], dout: list[Tensor], dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor]]:
        tensors = {
            name: (x if x.dtype != self.job.dtype and dtype != torch.float64 else x.to(dtype)).requires_grad_(False)
            for name, x in self._piece.items()
        }
        leaves = [tensors[name].detach().requires_grad_() for name in self.names]
        tensors |= dict(zip(self.names, leaves))
        with torch.set_grad_enabled(bool(leaves)):
            outputs = flat(function(**self.job.arguments(tensors)))
        found = gradients(outputs, leaves, [dy.to(dtype) for dy in dout]) if leaves else []
        return [y.detach() for y in outputs], found


def _ratio(ours: Tensor, exact: Tensor, forms: list[Tensor], gradient: bool = False) -> float:
    if ours.shape != exact.shape:
        return math.inf
    return error_ratio(ours, exact, forms, gradient=gradient).worst
