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

    Where nobody looks at operators and nothing is to be recorded, the backend is called at once: the operator's
    boundary costs a third of a small call (96 us instead of 62 for a tiny temporal attention on the CPU).
    """
    op = OVERLOADS[call.op]
    if not call.grad and not torch.compiler.is_compiling() and _unobserved(call):
        results = _forward(call, requested(backend))
        return results if call.OUTPUTS > 1 else results[0]
    arguments = (*call.tensors(), *call.attributes(), call.grad, requested(backend))
    if call.grad or torch.compiler.is_compiling():
        return op(*arguments)
    # Nothing to record: going below autograd at once saves its Python kernel, half the cost of a small call.
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


def _forward(call: Call, backend: str) -> tuple[Tensor, ...]:
    chosen = choose(call, "fwd", backend)
    if call.grad:
        choose(call, "bwd", backend)  # a backward that cannot run is an error now, not later
    record(call.op, chosen, "fwd")
    return implementation(call, chosen).forward(call)


def register(op: str, kind: type[Call], prepare: Callable[..., Call]) -> None:
    """Defines the operators ``vdcore::<op>`` and ``vdcore::<op>_backward``."""
    PREPARE[op] = prepare
    names = [name.rstrip("?") for name in kind.TENSORS]
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

    def wanted_names(wanted: list[bool]) -> frozenset[str]:
        return frozenset(name for name, yes in zip(names, wanted) if yes)

    # ---- forward ----

    def forward(*values: Any) -> Any:
        results = _forward(build(values, values[-2]), values[-1])
        return results if outputs > 1 else results[0]

    def forward_fake(*values: Any) -> Any:
        results = build(values, values[-2]).empty_outputs()
        return results if outputs > 1 else results[0]

    _library.impl(op, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vdcore::{op}", forward_fake, lib=_library)

    # ---- backward ----

    def split(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], Call, frozenset[str]]:
        """grads, outputs, call, wanted."""
        grads, kept, rest = values[:outputs], values[outputs : outputs + saved], values[outputs + saved :]
        return grads, kept, build(rest, True), wanted_names(rest[-2])

    def backward_op(*values: Any) -> list[Tensor]:
        grads, kept, call, wanted = split(values)
        record(op, values[-1], "bwd")
        run_backward = implementation(call, values[-1]).backward
        assert run_backward is not None
        found = run_backward(call, kept, grads, wanted)
        return [
            found[name].to(x.dtype) if name in wanted else torch.empty(0, dtype=x.dtype, device=x.device)
            for name, x in zip(names, call.tensors())
            if x is not None
        ]

    def backward_fake(*values: Any) -> list[Tensor]:
        _, _, call, wanted = split(values)
        return [
            torch.empty(x.shape if name in wanted else 0, dtype=x.dtype, device=x.device)
            for name, x in zip(names, call.tensors())
            if x is not None
        ]

    _library.impl(f"{op}_backward", backward_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vdcore::{op}_backward", backward_fake, lib=_library)

    # ---- autograd ----

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        results = output if outputs > 1 else (output,)
        ctx.save_for_backward(*inputs[:n], *results[:saved])
        ctx.attributes = inputs[n : n + m]
        ctx.backend = choose(build(inputs, True), "bwd", inputs[-1])

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved_tensors = ctx.saved_tensors  # activation checkpointing hands them out once
        tensors, kept = saved_tensors[:n], saved_tensors[n:]
        needed = [bool(x) for x in ctx.needs_input_grad[:n]]
        wanted = [yes and name not in kind.PASSED for yes, name in zip(needed, names)]
        given: list[Tensor | None] = [None] * n
        if any(wanted):
            op_backward = getattr(torch.ops.vdcore, f"{op}_backward")
            found = iter(op_backward(*grads, *kept, *tensors, *ctx.attributes, wanted, ctx.backend))
            given = [None if x is None else next(found) for x in tensors]
        passed = [grads[kind.PASSED[name]] if name in kind.PASSED else dx for name, dx in zip(names, given)]
        return (*(dx if yes else None for dx, yes in zip(passed, needed)), *(None,) * (m + 2))

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
