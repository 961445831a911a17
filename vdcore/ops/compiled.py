"""What ``torch.compile`` makes of a call: an operator of torch's library, and its derivatives there.

Elsewhere calls are run at once, or are steps of :mod:`vdcore.ops.derivatives`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from vdcore.modes import is_transformed
from vdcore.ops.call import Call
from vdcore.ops.choose import OVERLOADS, has_tangent
from vdcore.ops.derivatives import TANGENTS, Jvp


def present(call: Call, results: tuple[Tensor | None, ...]) -> Any:
    """Results as an operator returns them: empty tensors for what is not wanted."""
    found = tuple(call.main.new_empty(0) if x is None else x for x in results)
    return found if call.OUTPUTS > 1 else found[0]


def define_tangents(library: torch.library.Library, kind: type[Call]) -> None:
    """The operator ``vdcore::<op>_jvp``, by which a compiled function has the tangents of ``vdcore::<op>``.

    By a formula in torch's operators, or an engine: no gradient's gradient can be taken inside of an operator.
    """
    op, inputs = kind.op, kind.SCHEMA
    if op not in TANGENTS:
        return
    n, saved = len(kind.NAMES), kind.OUTPUTS if kind.SAVES_OUTPUTS else 0
    before = [f"Tensor output_{i}" for i in range(saved)] + [f"Tensor? tangent_{i}" for i in range(n)]
    returns = ", ".join(["Tensor"] * kind.OUTPUTS)
    library.define(f"{op}_jvp({', '.join([*before, *inputs, 'str backend'])}) -> ({returns})")

    def jvp(*values: Any) -> Any:
        kept, tangents, own, numbers = (
            values[:saved],
            values[saved:][:n],
            values[saved + n :][:n],
            values[saved + 2 * n :],
        )
        step = Jvp(kind, numbers[:-1], numbers[-1], tuple(dx is not None for dx in tangents))
        found = step.run(*own, *kept, *(dx for dx in tangents if dx is not None))
        return found if kind.OUTPUTS > 1 else found[0]

    def fake(*values: Any) -> Any:
        call = kind.build(values[saved + n :][:n], values[saved + 2 * n : -1], True)
        return present(call, call.empty_outputs())

    library.impl(f"{op}_jvp", jvp, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vdcore::{op}_jvp", fake, lib=library)
    lib = Guarded(library, kind, f"{op}_jvp")
    refuse(lib, f"{op}_jvp", f"{op}: derivatives of tangents are not supported under torch.compile")


class Guarded:
    """Registers autograd's kernels behind a look at what they would drop: torch.library's know backward alone.

    Calls of the public functions come by here under torch.compile only; elsewhere they are steps. Under torch.func.jvp
    the operator is called below autograd, and ``vdcore::<op>_jvp`` beside it: both go on to what is around.
    """

    def __init__(self, library: torch.library.Library, kind: type[Call], name: str) -> None:
        self.library = library
        self.kind = kind
        self.pushes = name == kind.op and kind.op in TANGENTS

    def impl(self, name: str, kernel: Callable[..., Any], key: str, *, with_keyset: bool) -> None:
        def guarded(keyset: Any, *values: Any) -> Any:
            if is_transformed():
                top = torch._C._functorch.peek_interpreter_stack()
                if top is not None and top.key() == TransformType.Jvp and self.pushes:
                    return _with_tangents(self.kind, values)
                known = top is None or top.key() in (TransformType.Vmap, TransformType.Functionalize)
                if not known or has_tangent(*(x for x in values if isinstance(x, Tensor))):
                    which = "the tangents of torch.func.jvp alone, once," if self.pushes else "no tangents"
                    raise RuntimeError(
                        f"{self.kind.op}: as torch's operator, which is what torch.compile makes of it, it has {which} "
                        "and no gradients of torch.func; take these of the function that is not compiled"
                    )
            return kernel(keyset, *values)

        self.library.impl(name, guarded, key, with_keyset=with_keyset)


def _with_tangents(kind: type[Call], values: tuple[Any, ...]) -> Any:
    """The operator's results under torch.func.jvp, with their tangents.

    Its dual level is 0, of which a compiled function's code does not tell ``torch.autograd.forward_ad``.
    """
    n, outputs = len(kind.NAMES), kind.OUTPUTS
    own, rest = values[:n], values[n:-2]
    duals = [x if x is None or not x.is_floating_point() else forward_ad.unpack_dual(x, level=0) for x in own]
    plain = [x.primal if isinstance(x, forward_ad.UnpackedDualTensor) else x for x in duals]
    tangents = [x.tangent if isinstance(x, forward_ad.UnpackedDualTensor) else None for x in duals]
    moved = any(dx is not None for dx in tangents)
    with torch._C._AutoDispatchBelowAutograd():
        found = OVERLOADS[kind.op](*plain, *rest, values[-2] or moved, values[-1])
        if not moved:
            return found
        kept = () if not kind.SAVES_OUTPUTS else found if outputs > 1 else (found,)
        push = getattr(torch.ops.vdcore, f"{kind.op}_jvp")
        pushed = push(*kept, *tangents, *plain, *rest, values[-1])
    if outputs == 1:
        return forward_ad.make_dual(found, pushed, level=0)
    return tuple(forward_ad.make_dual(y, dy, level=0) for y, dy in zip(found, pushed))


def refuse(lib: Any, name: str, message: str) -> None:
    """The operator ``vdcore::<name>`` has no derivative."""

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(message)

    torch.library.register_autograd(f"vdcore::{name}", backward, setup_context=_setup_nothing, lib=lib)


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass
