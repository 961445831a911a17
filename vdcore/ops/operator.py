"""From a call to a torch operator: schema, fake, autograd, all from the call's own description.

Every public function checks its arguments, makes a :class:`Call` and runs it here: one operator ``vdcore::<op>``, with
``vdcore::<op>_backward`` behind it. Backends for both directions are chosen when forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdcore.backends import choose, implementation, reasons, record, requested
from vdcore.backends.call import Call

_library = torch.library.Library("vdcore", "DEF")

# Public function -> how its arguments become a call; for explain().
PREPARE: dict[str, Callable[..., Call]] = {}
OVERLOADS: dict[str, Any] = {}


def run(call: Call, backend: str | None) -> Any:
    """Runs a checked call as a torch operator: a tensor, or a tuple of them where the call has several outputs.

    Where nobody looks at operators the backend is called at once, and its gradients by a function of autograd: the
    operators' boundaries cost more than all the rest of a small call. A tiny temporal attention on the CPU: 62 us
    instead of 96, with gradients 116 instead of 477 forward and 332 instead of 662 forward and backward.
    """
    name = requested(backend)
    if not torch.compiler.is_compiling() and _unobserved(call):
        results = _Direct.apply(call, name, *call.tensors()) if call.grad else _forward(call, name)[0]
        return results if call.OUTPUTS > 1 else results[0]
    op, arguments = OVERLOADS[call.op], (*call.tensors(), *call.attributes(), call.grad, name)
    if call.grad or torch.compiler.is_compiling():
        return op(*arguments)
    # Nothing to record: going below autograd at once saves its Python kernel.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


_PLAIN = (Tensor, torch.nn.Parameter)


def _unobserved(call: Call) -> bool:
    """Plain tensors with memory, and no mode, transform, tracer or profiler that would have to see the operator."""
    return (
        call.main.device.type in ("cpu", "cuda")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
        and all(x is None or type(x) in _PLAIN for x in call.tensors())
    )


def _forward(call: Call, backend: str) -> tuple[tuple[Tensor, ...], str]:
    """The outputs, and who runs backward: if nobody can, that is an error now, not later."""
    chosen = choose(call, "fwd", backend)
    behind = choose(call, "bwd", backend) if call.grad else ""
    record(call.op, chosen, "fwd")
    return implementation(call, chosen).forward(call), behind


class _Direct(torch.autograd.Function):
    """A call with gradients, without an operator's boundary."""

    @staticmethod
    def forward(ctx: Any, call: Call, backend: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results, behind = _forward(call, backend)
        _save(ctx, call, tensors, call.attributes(), results, behind)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, *_gradients(ctx, grads, [bool(x) for x in ctx.needs_input_grad[2:]])


def _save(
    ctx: Any,
    call: Call,
    tensors: tuple[Tensor | None, ...],
    attributes: tuple[Any, ...],
    results: tuple[Tensor, ...],
    backend: str,
) -> None:
    """What backward needs; tensors through autograd, so that hooks and checkpointing see them."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(results if call.SAVES_OUTPUTS else ()))
    ctx.kind, ctx.op, ctx.attributes, ctx.backend = type(call), call.op, attributes, backend


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...], needed: list[bool]) -> list[Tensor | None]:
    """Of every tensor of the call."""
    kind, op, n = ctx.kind, ctx.op, len(ctx.kind.TENSORS)
    names = tensor_names(kind)
    saved = ctx.saved_tensors  # activation checkpointing hands them out once
    tensors, kept = saved[:n], saved[n:]
    wanted = [yes and name not in kind.PASSED for yes, name in zip(needed, names)]
    given: list[Tensor | None] = [None] * n
    if any(wanted):
        # With a graph of the gradients it is the operator, which knows how to refuse.
        plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        call = kind.build(op, True, tensors, ctx.attributes) if plain else None
        if call is not None and _unobserved(call):
            found = _backward(call, ctx.backend, kept, grads, wanted)
        else:
            op_backward = getattr(torch.ops.vdcore, f"{op}_backward")
            found = op_backward(*grads, *kept, *tensors, *ctx.attributes, wanted, ctx.backend)
        each = iter(found)
        given = [None if x is None else next(each) for x in tensors]
    passed = [grads[kind.PASSED[name]] if name in kind.PASSED else dx for name, dx in zip(names, given)]
    return [dx if yes else None for dx, yes in zip(passed, needed)]


def _backward(
    call: Call, backend: str, kept: tuple[Any, ...], grads: tuple[Tensor | None, ...], wanted: list[bool]
) -> list[Tensor]:
    """One gradient for every tensor that is there; empty where it is not wanted."""
    record(call.op, backend, "bwd")
    run_backward = implementation(call, backend).backward
    assert run_backward is not None
    names = tensor_names(type(call))
    found = run_backward(call, kept, grads, frozenset(name for name, yes in zip(names, wanted) if yes))
    return [
        found[name].to(x.dtype) if yes else torch.empty(0, dtype=x.dtype, device=x.device)
        for name, x, yes in zip(names, call.tensors(), wanted)
        if x is not None
    ]


def tensor_names(kind: type[Call]) -> list[str]:
    return [name.rstrip("?") for name in kind.TENSORS]


def register(op: str, kind: type[Call], prepare: Callable[..., Call]) -> None:
    """Defines the operators ``vdcore::<op>`` and ``vdcore::<op>_backward``."""
    PREPARE[op] = prepare
    names = tensor_names(kind)
    inputs = [f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in kind.TENSORS]
    inputs += kind.ATTRIBUTES
    n, m, outputs = len(names), len(kind.ATTRIBUTES), kind.OUTPUTS
    saved = outputs if kind.SAVES_OUTPUTS else 0
    returns = ", ".join(["Tensor"] * outputs)
    _library.define(f"{op}({', '.join([*inputs, 'bool grad', 'str backend'])}) -> ({returns})")
    before = [f"Tensor? grad_{i}" for i in range(outputs)] + [f"Tensor output_{i}" for i in range(saved)]
    _library.define(f"{op}_backward({', '.join([*before, *inputs, 'bool[] wanted', 'str backend'])}) -> Tensor[]")

    def build(values: tuple[Any, ...], grad: bool) -> Call:
        return kind.build(op, grad, values[:n], values[n : n + m])

    # ---- forward ----

    def forward(*values: Any) -> Any:
        results, _ = _forward(build(values, values[-2]), values[-1])
        return results if outputs > 1 else results[0]

    def forward_fake(*values: Any) -> Any:
        results = build(values, values[-2]).empty_outputs()
        return results if outputs > 1 else results[0]

    _library.impl(op, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vdcore::{op}", forward_fake, lib=_library)

    # ---- backward ----

    def backward_op(*values: Any) -> list[Tensor]:
        grads, kept, rest = values[:outputs], values[outputs : outputs + saved], values[outputs + saved :]
        return _backward(build(rest, True), values[-1], kept, grads, rest[-2])

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

    # ---- autograd ----

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call, results = build(inputs, True), output if outputs > 1 else (output,)
        _save(ctx, call, inputs[:n], inputs[n : n + m], results, choose(call, "bwd", inputs[-1]))

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (*_gradients(ctx, grads, [bool(x) for x in ctx.needs_input_grad[:n]]), *(None,) * (m + 2))

    def setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def no_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{op}: double backward is not supported")

    OVERLOADS[op] = getattr(torch.ops.vdcore, op).default
    torch.library.register_autograd(f"vdcore::{op}", backward, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(
        f"vdcore::{op}_backward", no_double_backward, setup_context=setup_nothing, lib=_library
    )


def explain(op: str, /, *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
    """Why each backend can or cannot run a call of a public function: ``(backend, None or the reason)``.

    The usable backends come first, in the order in which they are tried. Takes the function's own arguments.

    Raises:
        ValueError: if there is no such function, or the arguments are wrong.
    """
    if op not in PREPARE:
        raise ValueError(f"explain: op must be one of {', '.join(PREPARE)}, got {op!r}")
    kwargs.pop("backend", None)
    return reasons(PREPARE[op](*args, **kwargs))
