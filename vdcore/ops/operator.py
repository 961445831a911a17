"""From a call to a torch operator: schema, fake, autograd, all from the call's fields.

Every public function checks its arguments, makes a :class:`Call` and runs it here: one operator ``vdcore::<op>``, with
``vdcore::<op>_backward`` behind it. Backends for both directions are chosen when forward runs.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vdcore.modes import is_transformed
from vdcore.ops.call import Call
from vdcore.ops.check import without_autocast
from vdcore.ops.choose import (
    BACKENDS,
    OVERLOADS,
    Gradients,
    Implementation,
    choose,
    choose_both,
    choose_tangents,
    forward_on,
    has_tangent,
    reasons,
    requested,
    run_backward,
    run_forward,
    unobserved,
)
from vdcore.ops.compiled import Guarded, define_tangents, present, refuse
from vdcore.ops.derivatives import TANGENTS, Forward, Given, gradients, transformed

_library = torch.library.Library("vdcore", "DEF")

FUNCTIONS: dict[str, Callable[..., Any]] = {}  # the public ones, by name
# By operator: from what computes the outputs of a call, to a function of the arguments of the torch operator.
DECOMPOSE: dict[str, Callable[[Callable[[Any], tuple[Tensor | None, ...]]], Callable[..., Any]]] = {}


# ---- Running a call ----


def run(call: Call, backend: str | None) -> Any:
    """Runs a checked call as a torch operator: a tensor, or a tuple of them where the call has several outputs.

    If no dispatch mode, hook or tracer is active, the backend is called at once, and its gradients by a function of
    autograd: the operators' boundaries cost more than all the rest of a small call. Under the transforms of torch.func
    and in a dual level it is a step of :mod:`vdcore.ops.derivatives`.
    """
    tensors = call.tensors()
    call.grad = _wants_grad(tensors)
    if _capturing.on:
        raise _Captured(call)
    name = requested(backend)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        if is_transformed():
            results: tuple[Any, ...] = transformed(Forward(type(call), call.numbers(), name), tensors)
            return results if call.OUTPUTS > 1 else results[0]
        if unobserved(tensors):
            if call.grad:
                results = _record(call, name, *tensors)
            else:
                results = run_forward(call, name)
            return results if call.OUTPUTS > 1 else results[0]
    op, arguments = OVERLOADS[call.op], (*tensors, *call.numbers(), call.grad, name)
    if call.grad or compiling:
        return op(*arguments)
    # Nothing to record: going below autograd at once saves its Python kernel.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _wants_grad(tensors: Sequence[Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110  half the time of any()
        if x is not None and x.requires_grad:
            return True
    return False


class _Direct(torch.autograd.Function):
    """A call with gradients, without an operator's boundary."""

    @staticmethod
    def forward(ctx: Any, call: Call, backend: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        forward_backend, backward_backend = choose_both(call, backend)
        results = forward_on(call, forward_backend)
        _save(ctx, type(call).again, tensors, call.rest(), results if call.SAVES_OUTPUTS else (), backward_backend)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, *_gradients(ctx, grads, ctx.needs_input_grad[2:])


# Function.apply without its look at transforms, which run() has had: a third of its time.
_record: Callable[..., tuple[Any, ...]] = super(torch.autograd.Function, _Direct).apply


def _save(
    ctx: Any,
    again: Callable[[Any, Any], Call],
    tensors: tuple[Tensor | None, ...],
    rest: tuple[Any, ...],
    kept: tuple[Tensor | None, ...],
    backend: str,
) -> None:
    """What backward needs; tensors through autograd, so that hooks and checkpointing see them.

    Args:
        again: makes the call of its tensors and the rest.
        kept: of its results.
    """
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)
    ctx.call = again, rest, len(tensors), backend


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...], needed: Sequence[bool]) -> list[Tensor | None]:
    """Of every tensor of the call."""
    saved = ctx.saved_tensors  # activation checkpointing hands them out once
    again, rest, n, backend = ctx.call
    tensors = saved[:n]
    return gradients(again(tensors, rest), backend, tensors, saved[n:], grads, needed)


# ---- Calls without running them ----


class _Captured(Exception):
    """Carries a call out of the public function that made it."""

    def __init__(self, call: Call) -> None:
        self.call = call


class _Capturing(threading.local):
    on: bool = False


_capturing = _Capturing()


def capture(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The call that a public function makes of its arguments, checked and not run."""
    _capturing.on = True
    try:
        function(*args, **kwargs)
    except _Captured as captured:
        return captured.call
    finally:
        _capturing.on = False
    raise TypeError(f"{function} makes no call")


def explain(op: str, /, *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
    """Why each backend can or cannot run a call of a public function: ``(backend, None or the reason)``.

    The usable backends come first, in the order in which they are tried. Takes the function's own arguments. Where one
    of these has a forward-mode tangent, a last row ``("tangents", ...)`` says who computes those of the result.

    Raises:
        ValueError: if there is no such function, or the arguments are wrong.
    """
    if op not in FUNCTIONS:
        raise ValueError(f"explain: op must be one of {', '.join(FUNCTIONS)}, got {op!r}")
    call = capture(FUNCTIONS[op], *args, **kwargs)
    found = reasons(call)
    if has_tangent(*call.tensors()):
        backend, reason = choose_tangents(call, requested(kwargs.get("backend")))
        by = backend if reason is None else f"the formula in torch's operators: {reason}"
        found.append(("tangents", f"by {by}"))
    return found


# ---- Gradients by autograd, and the reference ----


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records inside, also within a torch operator, where the dispatcher has left it behind."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        yield


def by_autograd(
    call: Call,
    wanted: frozenset[str],
    function: Callable[[Any], tuple[Tensor, ...]],
    grads_of: Callable[[tuple[Tensor, ...]], Sequence[Tensor | None]],
) -> Gradients:
    """Gradients of the ``wanted`` tensors through ``function(call)``; ``grads_of`` gives those of its results."""
    tensors = call.tensors()
    leaves = tuple(
        x.detach().requires_grad_() if x is not None and name in wanted else x for name, x in zip(call.NAMES, tensors)
    )
    inputs = {name: x for name, x in zip(call.NAMES, leaves) if name in wanted and x is not None}
    with recording():
        results = function(call.build(leaves, call.numbers(), call.grad))
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(results, grads_of(results)) if dy is not None and y.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if pairs:
        with recording():
            outputs, grads = zip(*pairs)
            found = torch.autograd.grad(outputs, list(inputs.values()), grads, allow_unused=True)
    return {
        name: torch.zeros_like(x, memory_format=torch.contiguous_format) if dx is None else dx.contiguous()
        for (name, x), dx in zip(inputs.items(), found)
    }


def by_formula(formula: Callable[..., Any]) -> Implementation:
    """An operator's reference as a backend: exact for every call, in any float dtype, on any device. Slow.

    Args:
        formula: its parameters are called as what the call holds.
    """
    names = tuple(inspect.signature(formula).parameters)

    def results_of(call: Call) -> tuple[Tensor, ...]:
        with without_autocast(call.main):  # tensors are of its dtype already; what is computed from them is not rounded
            found = formula(**{name: getattr(call, name) for name in names})
        return found if isinstance(found, tuple) else (found,)

    def forward(call: Call) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = results_of(call)
        outputs = call.empty_outputs()
        return tuple(out if out is None else x.to(out.dtype).contiguous() for out, x in zip(outputs, results))

    def backward(call: Call, outputs: Any, grads: tuple[Tensor | None, ...], wanted: frozenset[str]) -> Gradients:
        with without_autocast(call.main):
            return by_autograd(call, wanted, results_of, lambda results: grads)

    return Implementation(forward, backward, formula=results_of)


# ---- The torch operator ----


def _gradients_or_empty(call: Call, backend: str, kept: Any, grads: Any, wanted: Sequence[bool]) -> list[Tensor]:
    """As an operator returns them: one for every tensor that is there, empty where it is not wanted."""
    tensors = call.tensors()
    found = run_backward(call, backend, kept, grads, tensors, wanted)
    return [x.new_empty(0) if dx is None else dx for x, dx in zip(tensors, found) if x is not None]


def _decomposed(
    build: Callable[[tuple[Any, ...], bool], Call], evaluate: Callable[[Any], tuple[Tensor | None, ...]]
) -> Callable[..., Any]:
    def decomposed(*values: Any) -> Any:
        call = build(values, values[-2])
        return present(call, evaluate(call))

    return decomposed


def register(
    function: Callable[..., Any],
    kind: type[Call],
    tangents: Callable[[Any, Given], tuple[Tensor, ...]] | None = None,
    **implementations: Implementation,
) -> None:
    """Defines ``vdcore::<op>``, ``vdcore::<op>_backward`` and ``_jvp``, and says what runs them on each backend.

    Args:
        function: the public function, which has the operator's name.
        kind: its call.
        tangents: ``tangents(call, given)``, the outputs' tangents from those of some tensors, by name; in torch's
            differentiable operators. None: through the reference.
        implementations: by backend.
    """
    op = kind.op
    FUNCTIONS[op] = function
    if tangents is not None:
        TANGENTS[op] = tangents
    for backend, its in implementations.items():
        BACKENDS[backend].operators[op] = its
    n, inputs, outputs = len(kind.NAMES), kind.SCHEMA, kind.OUTPUTS
    m, saved = len(inputs) - n, outputs if kind.SAVES_OUTPUTS else 0
    returns = ", ".join(["Tensor"] * outputs)
    _library.define(f"{op}({', '.join([*inputs, 'bool grad', 'str backend'])}) -> ({returns})")
    before = [f"Tensor? grad_{i}" for i in range(outputs)] + [f"Tensor output_{i}" for i in range(saved)]
    _library.define(f"{op}_backward({', '.join([*before, *inputs, 'bool[] wanted', 'str backend'])}) -> Tensor[]")

    def build(values: tuple[Any, ...], grad: bool) -> Call:
        return kind.build(values[:n], values[n : n + m], grad)

    # ---- forward ----

    def forward(*values: Any) -> Any:
        call = build(values, values[-2])
        if call.grad:
            choose(call, "bwd", values[-1])  # if nobody can, that is an error now, not later
        return present(call, run_forward(call, values[-1]))

    def forward_fake(*values: Any) -> Any:
        call = build(values, values[-2])
        return present(call, call.empty_outputs())

    _library.impl(op, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vdcore::{op}", forward_fake, lib=_library)

    # ---- backward ----

    def backward_op(*values: Any) -> list[Tensor]:
        grads, kept, rest = values[:outputs], values[outputs : outputs + saved], values[outputs + saved :]
        return _gradients_or_empty(build(rest, True), values[-1], kept, grads, rest[-2])

    def backward_fake(*values: Any) -> list[Tensor]:
        rest = values[outputs + saved :]
        tensors = build(rest, True).tensors()
        return [
            torch.empty(x.shape if yes else 0, dtype=x.dtype, device=x.device)
            for x, yes in zip(tensors, rest[-2])
            if x is not None
        ]

    _library.impl(f"{op}_backward", backward_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vdcore::{op}_backward", backward_fake, lib=_library)
    define_tangents(_library, kind)

    # ---- autograd ----

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call, results = build(inputs, True), output if outputs > 1 else (output,)
        again, kept = partial(kind.build, grad=True), results if kind.SAVES_OUTPUTS else ()
        _save(ctx, again, inputs[:n], inputs[n : n + m], kept, choose(call, "bwd", inputs[-1]))

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (*_gradients(ctx, grads, ctx.needs_input_grad[:n]), *(None,) * (m + 2))

    OVERLOADS[op] = getattr(torch.ops.vdcore, op).default
    DECOMPOSE[op] = partial(_decomposed, build)
    lib: Any = Guarded(_library, kind, op)
    torch.library.register_autograd(f"vdcore::{op}", backward, setup_context=setup_context, lib=lib)
    refuse(lib, f"{op}_backward", f"{op}: double backward is not supported under torch.compile")
