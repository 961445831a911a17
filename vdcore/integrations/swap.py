"""How a module of a host comes to run vdcore, and how it is put back: one mechanism for every host.

A host's adapter finds the :class:`Change` of each module, or the reason why there is none; :func:`swap` makes all
changes or none, and reports them. An attention module gets another processor, which keeps the one it replaced; any
other module gets another class, derived from its own, which remembers it. Each holds all that undoing it needs, so that
copies and pickles of a swapped model can be swapped out as well. Parameters, buffers, hooks and child modules are never
touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from types import FunctionType
from typing import Any, ClassVar

from torch import nn

from vdcore.integrations.report import Report, note_left

# ---- Classes that are made at run time ----


class MadeAtRunTime:
    """Base of classes that only a call makes: their copies and pickles name the function and its arguments instead."""

    MADE_BY: ClassVar[tuple[Callable[..., type], tuple[Any, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, type(self).MADE_BY, self.state()

    def state(self) -> dict[str, Any]:
        return self.__dict__.copy()


def _rebuild(make: Callable[..., type], arguments: tuple[Any, ...]) -> Any:
    cls: Any = make(*arguments)
    return cls.__new__(cls)


class ServedModule(MadeAtRunTime):
    """Base of the classes that replace a host's."""

    host: ClassVar[type[nn.Module]]
    SERVES: ClassVar[str]


class ServedProcessor:
    """Base of the processors that replace a host's, which they keep as ``host``."""

    host: Any
    SERVES: ClassVar[str]  # which operators, for the report


class ServingHook:
    """Base of forward pre-hooks that belong to the swap."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError


@lru_cache(maxsize=256)
def served_class(host: Any, forward: Any, serves: str) -> type[nn.Module]:
    """The host's class with another forward. It keeps the name, by which hosts save and load.

    Args:
        forward: takes the arguments of the host's forward, and returns its result, or the reason, a ``str``, why the
            host's own forward has to run; or :class:`Renamed`.
    """
    run = forward.of(host) if isinstance(forward, Renamed) else forward

    @wraps(host.forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = run(self, *args, **kwargs)
        if isinstance(out, str):
            note_left(self, out)
            return host.forward(self, *args, **kwargs)
        return out

    names = {
        "forward": replaced,
        "host": host,
        "SERVES": serves,
        "MADE_BY": (served_class, (host, forward, serves)),
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    return type(host.__name__, (ServedModule, host), names)


# ---- A host's function in which names mean something else ----


def rebind(function: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """A copy of a Python function in which these global names mean these values. Nothing outside of it sees them."""
    plain: Any = inspect.unwrap(function)
    scope = {**plain.__globals__, **names}
    # Without a name of its module torch.compile takes these globals, and not the module's.
    scope.pop("__name__", None)
    copied = FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    copied.__kwdefaults__ = plain.__kwdefaults__
    return copied


def names_used(function: Callable[..., Any]) -> set[str]:
    """Global names and attributes that a Python function uses; none of other functions."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else set(code.co_names)


@dataclass(frozen=True)
class Renamed:
    """The host's own forward, in which the names of its functions mean vdcore's.

    Args:
        functions: by the names that the host's modules have for them.
        serves: which operators, for the report.
    """

    functions: tuple[tuple[str, Callable[..., Any]], ...]
    serves: str

    def of(self, host: Any) -> Callable[..., Any]:
        return rebind(host.forward, dict(self.functions))

    def find(self, name: str, module: nn.Module) -> list[Change] | str | None:
        if not names_used(type(module).forward) & set(dict(self.functions)):
            return None
        return changed_forward(module) or [Change.of_forward(module, self, self.serves)]


# ---- Changes ----


@dataclass(frozen=True)
class Change:
    """One module, or other object of the host, and how it comes to be served and is put back."""

    module: Any
    do: Callable[[Any], None]
    undo: Callable[[Any], None]

    @staticmethod
    def of_processor(attn: nn.Module, make: Callable[..., ServedProcessor], *args: Any) -> Change:
        """
        Args:
            make: makes the processor from the one it replaces and ``args``.
        """
        return Change(attn, lambda attn: setattr(attn, "processor", make(attn.processor, *args)), restore)

    @staticmethod
    def of_forward(module: nn.Module, forward: Any, serves: str) -> Change:
        """As :func:`served_class` has them."""
        return Change(module, partial(_serve_with, forward=forward, serves=serves), restore)

    @staticmethod
    def of_hook(module: nn.Module, hook: ServingHook) -> Change:
        return Change(module, lambda module: module.register_forward_pre_hook(hook, with_kwargs=True), restore)

    def make(self) -> None:
        self.do(self.module)


def _serve_with(module: Any, forward: Any, serves: str) -> None:
    host: Any = type(module)
    module.__class__ = served_class(host, forward, serves)


def make_all(changes: Sequence[Change]) -> None:
    """All of them, or none if one fails."""
    done: list[Change] = []
    try:
        for change in changes:
            done.append(change)
            change.make()
    except BaseException:
        for change in reversed(done):
            change.undo(change.module)
        raise


def changed_forward(module: nn.Module) -> str | None:
    """A reason if the module's own forward is not the one that runs when it is called."""
    if "forward" in module.__dict__:
        return "its forward is replaced already, by a hook or by offloading"
    return None


def is_served(module: nn.Module) -> bool:
    return isinstance(module, ServedModule) or isinstance(getattr(module, "processor", None), ServedProcessor)


def restore(module: Any) -> None:
    """Undoes the changes of one module. Restoring what was never changed does nothing."""
    if isinstance(module, ServedModule):
        module.__class__ = type(module).host  # type: ignore[assignment]
    processor = module.__dict__.get("processor")
    if isinstance(processor, ServedProcessor):
        module.processor = processor.host
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, ServingHook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


# ---- Swapping models ----

# The changes that serve a module of this name, children included where they go together; or the reason why it is left;
# or None if it is none of the host's that vdcore could serve.
Find = Callable[[str, nn.Module], "list[Change] | str | None"]


def swap(
    models: Iterable[tuple[str, nn.Module, Find]], report: Report | None = None, hooks: Sequence[Change] = ()
) -> Report:
    """Changes all modules for which changes are found, or none of any model if one fails.

    Args:
        models: each with the prefix of its modules' names in the report.
        hooks: changes that come with the swap, and are not reported.
    """
    report = Report() if report is None else report
    changes: list[Change] = []
    served: list[tuple[str, Any]] = []
    for prefix, model, find in models:
        planned: set[nn.Module] = set()
        for name, module in named_modules(model):
            found = None if module in planned or is_served(module) else find(name, module)
            if isinstance(found, str):
                report.add_left(prefix + name, type(module).__name__, found)
            elif found:
                changes += found
                planned |= {change.module for change in found}
            if module in planned or is_served(module):
                served.append((prefix + name, module))
    make_all([*changes, *hooks])
    for name, module in served:
        serving = [module, *(x for x in (getattr(module, "processor", None),) if isinstance(x, ServedProcessor))]
        report.add_served(name, type(module).__name__, serving[-1].SERVES, *serving)
    return report


def swap_model(model: Any, find: Find) -> Report:
    """Swaps one module and its children in."""
    return swap([("", _module(model, "swap_in"), find)])


def swap_out(model: Any) -> None:
    """Undoes a swap of a module and its children, bit for bit. What was never swapped stays as it is."""
    for module in list(_module(model, "swap_out").modules()):
        restore(module)


def _module(model: Any, verb: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parents before children; the model itself is named after its class."""
    for name, module in model.named_modules():
        yield name or type(model).__name__, module
