"""Derivatives beyond a backward: tangents, transforms of torch.func, derivatives of derivatives.

Three steps make all of them: an operator forward, its gradients, its tangents (Jacobian-vector products). Each is run
on plain tensors by whoever is fastest, and knows its own derivatives:

======== =============================== ===============================
step     gradient                        tangent
======== =============================== ===============================
Forward  the step Backward               the step Jvp
Backward by the reference, if asked for  by the reference
Jvp      by its formula                  by its formula
======== =============================== ===============================
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _unwrap_for_grad,
    _wrap_for_grad,
    is_legacy_batchedtensor,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from vdcore.modes import is_differentiated
from vdcore.ops.call import Call
from vdcore.ops.choose import (
    BACKENDS,
    OVERLOADS,
    choose,
    choose_tangents,
    implementation,
    record,
    run_backward,
    run_forward,
    unobserved,
)

Given = dict[str, Tensor]  # tangents, by the name of their tensor
TANGENTS: dict[str, Callable[[Any, Given], tuple[Tensor, ...]]] = {}  # formulas, by operator


class _DoubleBackward:
    """Contexts that are open. Of the process, not of a thread: autograd runs backward in threads of its own."""

    count = 0
    lock = threading.Lock()


@contextmanager
def double_backward(by: str) -> Iterator[None]:
    """Gradients taken inside with ``create_graph=True`` can be differentiated again, slowly.

    Args:
        by: ``"reference"``: through the operators' plain PyTorch references, with all scores in memory.

    Raises:
        ValueError: on another name.
    """
    if by != "reference":
        raise ValueError(f"double_backward: by must be 'reference', got {by!r}")
    with _DoubleBackward.lock:
        _DoubleBackward.count += 1
    try:
        yield
    finally:
        with _DoubleBackward.lock:
            _DoubleBackward.count -= 1


# ---- A step, and how autograd and torch.func see it ----


@dataclass(frozen=True, eq=False)
class Step:
    """A function of the tensors of a call, and of others after them; None stands for those that are not there.

    Args:
        kind, numbers: the call's, with its tensors.
        backend: the name that was asked for.
    """

    kind: type[Call]
    numbers: tuple[Any, ...]
    backend: str

    def call(self, tensors: Sequence[Tensor | None]) -> Any:
        return self.kind.build(tuple(tensors[: len(self.kind.NAMES)]), self.numbers, True)

    def reference(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results of the call, in torch's operators."""
        formula = BACKENDS["reference"].operators[self.kind.op].formula
        assert formula is not None
        return formula(self.call(tensors))

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """On plain tensors, not recorded."""
        raise NotImplementedError

    def formula(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The same in torch's operators, which every transform knows."""
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """How many of the call's results come after its tensors, for steps after forward."""
        return self.kind.OUTPUTS if self.kind.SAVES_OUTPUTS else 0

    def pull(self, saved: tuple[Any, ...], grads: tuple[Any, ...], needed: Sequence[bool]) -> Sequence[Tensor | None]:
        """Gradients of its tensors; ``saved``: these, and the results.

        None of the call's results among them: the formula makes these anew, of the tensors.
        """
        n = len(self.kind.NAMES)
        real = [yes and not n <= i < n + self.kept for i, yes in enumerate(needed)]
        found = iter(_pull(self.formula, saved[: len(needed)], real)[1](grads))
        return [next(found) if yes else None for yes in real]

    def push(self, saved: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Tangents of its results; those of the call's results do not count, as in :meth:`pull`."""
        n = len(self.kind.NAMES)
        real = [None if n <= i < n + self.kept else dx for i, dx in enumerate(tangents)]
        return _push(self.formula, saved[: len(tangents)], real)


Formula = Callable[..., tuple[Tensor, ...]]


def _pull(
    formula: Formula, tensors: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor | None]], tuple[Tensor, ...]]]:
    """The formula's results, and what makes of gradients of these, or None, those of the needed tensors."""

    def of_needed(*some: Tensor) -> tuple[Tensor, ...]:
        each = iter(some)
        return formula(*(next(each) if yes else x for x, yes in zip(tensors, needed)))

    results, pull = torch.func.vjp(of_needed, *(x for x, yes in zip(tensors, needed) if yes))  # type: ignore[misc]

    def call(grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return pull(tuple(torch.zeros_like(y) if dy is None else dy.to(y.dtype) for y, dy in zip(results, grads)))

    return results, call


def _push(formula: Formula, tensors: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of the formula's results.

    Gradients are linear in what they are pulled back from: their own pullback, at any point, pushes forward. Unlike
    torch.func.jvp this may be done inside a dual level, of which there can be only one.
    """
    given = [x is not None for x in tangents]
    results, _ = _pull(formula, tensors, given)
    zeros = map(torch.zeros_like, results)
    _, push = torch.func.vjp(lambda *grads: _pull(formula, tensors, given)[1](grads), *zeros)  # type: ignore[misc]
    return push(tuple(x for x in tangents if x is not None))


@dataclass(frozen=True, eq=False)
class _Bound:
    """A step, and which of its tensors are there: torch.func takes all arguments apart, and most are None."""

    step: Step
    here: tuple[bool, ...]

    def whole(self, present: Sequence[Any]) -> tuple[Any, ...]:
        """One for each of the step's tensors, None for those that are not there; then what comes after these."""
        each = iter(present)
        return (*(next(each) if yes else None for yes in self.here), *each)


class _Apply(torch.autograd.Function):
    """A step under autograd and under the transforms of torch.func."""

    @staticmethod
    def forward(bound: _Bound, *present: Tensor) -> tuple[Tensor, ...]:
        return bound.step.run(*bound.whole(present))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.bound = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        bound: _Bound = ctx.bound
        needed = [bool(yes) for yes in bound.whole(ctx.needs_input_grad[1:])]
        found = bound.step.pull(bound.whole(ctx.saved_tensors), grads, needed)
        return None, *compress(found, bound.here)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        bound: _Bound = ctx.bound
        return bound.step.push(bound.whole(ctx.saved_tensors), bound.whole(tangents))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], bound: _Bound, *present: Tensor) -> Any:
        """One after another: what is mapped over may be a weight, or lengths."""
        parts = [
            _Apply.apply(bound, *(x if d is None else x.select(d, i) for x, d in zip(present, in_dims[1:])))
            for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(each) for each in zip(*parts))
        return results, (0,) * len(results)


def apply(step: Step, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    bound = _Bound(step, tuple(x is not None for x in tensors))
    return _Apply.apply(bound, *(x for x in tensors if x is not None))


def transformed(step: Forward, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The results under transforms of torch.func, and in a dual level.

    Where that is one ``jvp`` or level of plain tensors, their tangents are taken out and those of the results put in: a
    function of autograd under torch.func costs a fifth of a small call's time. What autograd records, too, it records
    below the transform.
    """
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack or (len(stack) == 1 and stack[0].key() == TransformType.Jvp):
        found = _pushed_once(step, tensors, stack[0].level() if stack else -1)
        if found is not None:
            return found
    return apply(step, tensors)


def _pushed_once(step: Forward, tensors: Sequence[Tensor | None], level: int) -> tuple[Any, ...] | None:
    """None: somebody else has to see these tensors. ``level``: of torch.func, -1 for none."""
    plain: list[Any] = list(tensors)
    tangents: list[Any] = [None] * len(tensors)
    for i, x in enumerate(tensors):
        if x is None or (level >= 0 and maybe_get_level(x) == -1):
            continue
        if x.is_floating_point():
            x, tangents[i] = torch._VF._unpack_dual(x, level=0)
        plain[i] = x if level < 0 else _unwrap_for_grad(x, level)
    moved = [dx if dx is None or level < 0 else _unwrap_for_grad(dx, level) for dx in tangents]
    if not (unobserved(tuple(plain)) and unobserved((plain[0], *moved))):
        return None
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*plain, *moved))
    with temporarily_pop_interpreter_stack() if level >= 0 else nullcontext():
        results: tuple[Any, ...] = apply(step, plain) if recorded else run_forward(step.call(plain), step.backend)
        if all(dx is None for dx in moved):
            return results
        of_results, operands = step.tangents_of((*plain, *results), moved)
        pushed: tuple[Any, ...] = apply(of_results, operands) if recorded else of_results.run(*operands)
    if level >= 0:
        results, pushed = (tuple(_wrap_for_grad(y, level) for y in found) for found in (results, pushed))
    return tuple(torch._VF._make_dual(y, dy, level=0) for y, dy in zip(results, pushed))


# ---- The steps ----


class Forward(Step):
    """The operator, keeping what the other steps need."""

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        if unobserved(tensors):
            return run_forward(self.call(tensors), self.backend)  # type: ignore[return-value]
        with torch._C._AutoDispatchBelowAutograd():
            found = OVERLOADS[self.kind.op](*tensors, *self.numbers, True, self.backend)
        return found if self.kind.OUTPUTS > 1 else (found,)

    def pull(self, saved: tuple[Any, ...], grads: tuple[Any, ...], needed: Sequence[bool]) -> Sequence[Tensor | None]:
        n = len(needed)
        kept = saved[n:] if self.kind.SAVES_OUTPUTS else ()
        call = self.call(saved)
        return gradients(call, choose(call, "bwd", self.backend), saved[:n], kept, grads, needed)

    def push(self, saved: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        step, operands = self.tangents_of(saved, tangents)
        return apply(step, operands)

    def tangents_of(self, saved: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Jvp, tuple[Any, ...]]:
        """The step that makes the results' tangents, and what it is applied to."""
        given = tuple(x is not None for x in tangents)
        kept = saved[len(given) :] if self.kind.SAVES_OUTPUTS else ()
        operands = (*saved[: len(given)], *kept, *(x for x in tangents if x is not None))
        return Jvp(self.kind, self.numbers, self.backend, given), operands


@dataclass(frozen=True, eq=False)
class Backward(Step):
    """Of the call's tensors, its results (where it saves them) and their gradients: the gradients of some tensors.

    Args:
        wanted: of which tensors.
        twice: it may itself be differentiated.
    """

    wanted: tuple[bool, ...]
    twice: bool

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        n, outputs = len(self.wanted), self.kind.OUTPUTS
        own, kept, grads = tensors[:n], tensors[n:-outputs], tensors[-outputs:]
        if unobserved(own):
            given = run_backward(self.call(own), self.backend, kept, grads, own, self.wanted)
            return tuple(dx for dx in given if dx is not None)
        op = getattr(torch.ops.vdcore, f"{self.kind.op}_backward")
        with torch._C._AutoDispatchBelowAutograd():
            found = op(*grads, *kept, *own, *self.numbers, list(self.wanted), self.backend)
        there = (yes for x, yes in zip(own, self.wanted) if x is not None)
        return tuple(dx for dx, yes in zip(found, there) if yes)

    def formula(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        own, grads = tensors[: len(self.wanted)], tensors[-self.kind.OUTPUTS :]
        return _pull(self.reference, own, self.wanted)[1](grads)

    def pull(self, saved: tuple[Any, ...], grads: tuple[Any, ...], needed: Sequence[bool]) -> Sequence[Tensor | None]:
        if not (self.twice or _DoubleBackward.count):
            raise RuntimeError(
                f"{self.kind.op}: double backward is not supported; with vdcore.double_backward('reference') it is "
                "taken through the reference"
            )
        return super().pull(saved, grads, needed)


@dataclass(frozen=True, eq=False)
class Jvp(Step):
    """Of the call's tensors, its results (where it saves them) and the tangents of some tensors: those of its results.

    Args:
        given: which tensors have tangents.
    """

    given: tuple[bool, ...]

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        own, kept, tangents = self._parts(tensors)
        call = self.call(own)
        chosen, reason = choose_tangents(call, self.backend)
        if reason is None and unobserved(tensors):
            record(self.kind.op, chosen, "jvp")
            run = implementation(call, chosen).tangents
            assert run is not None
            return run(call, kept, {name: dx.detach() for name, dx in tangents.items()})
        record(self.kind.op, "reference", "jvp")
        # A tangent that is a result as it stands: autograd tells the two apart by their identity.
        return tuple(y.clone() if any(y is x for x in tensors) else y for y in self.formula(*tensors))

    def formula(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        own, _, tangents = self._parts(tensors)
        if self.kind.op not in TANGENTS:
            return _push(self.reference, own, [tangents.get(name) for name in self.kind.NAMES])
        return TANGENTS[self.kind.op](self.call(own), tangents)

    def _parts(self, tensors: tuple[Any, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...], Given]:
        n = len(self.given)
        end = n + self.kept
        names = (name for name, yes in zip(self.kind.NAMES, self.given) if yes)
        return tensors[:n], tensors[n:end], dict(zip(names, tensors[end:]))


def _in_batches(grads: tuple[Tensor | None, ...]) -> bool:
    """Autograd was asked for several gradients at once, by ``is_grads_batched`` or a vectorized Jacobian.

    Their tensors have no memory that a kernel could read, and know no transform but torch's operators.
    """
    for dy in grads:  # noqa: SIM110  half the time of any()
        if dy is not None and is_legacy_batchedtensor(dy):
            return True
    return False


def gradients(
    call: Call,
    backend: str,
    tensors: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Of every tensor of a call, None where it needs none; the backend is one that can."""
    passed = call.PASSED
    wanted = [yes and name not in passed for yes, name in zip(needed, call.NAMES)] if passed else list(needed)
    given: list[Tensor | None] = [None] * len(wanted)
    if True in wanted:
        if torch.compiler.is_compiling():
            op = getattr(torch.ops.vdcore, f"{call.op}_backward")
            each = iter(op(*grads, *kept, *tensors, *call.numbers(), wanted, backend))
            found = [None if x is None else next(each) for x in tensors]
            given = [dx if yes else None for dx, yes in zip(found, wanted)]
        elif _in_batches(grads):
            given = run_backward(call, "reference", kept, grads, tensors, wanted)
        elif is_differentiated() or not unobserved(tensors):
            step = Backward(type(call), call.numbers(), backend, tuple(wanted), _DoubleBackward.count > 0)
            each = iter(apply(step, (*tensors, *kept, *grads)))
            given = [next(each) if yes else None for yes in wanted]
        else:
            given = run_backward(call, backend, kept, grads, tensors, wanted)
    for name, output in passed.items():
        i = call.NAMES.index(name)
        given[i] = grads[output] if needed[i] else None
    return given
