"""How a module of a host comes to run vdcore, and how it is put back: one mechanism for every host.

A host's adapter finds the :class:`Change` of each module, or the reason why there is none; :func:`swap` makes all
changes or none, and reports them. An attention module gets another processor, which keeps the one it replaced; any
other module gets another class, derived from its own, which remembers it. Each holds all that undoing it needs, so that
copies and pickles of a swapped model can be swapped out as well. Parameters, buffers, hooks and child modules are never
touched.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from types import FunctionType, MethodType, new_class
from typing import Any, ClassVar
from warnings import warn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

from vdcore.integrations.report import TURN, Report, note_left, running, slow_dtype

# ---- Classes that are made at run time ----


class MadeAtRunTime:
    """Base of classes that only a call makes: their copies and pickles name the function and its arguments instead."""

    MADE_BY: ClassVar[tuple[Callable[..., type], tuple[Any, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "MADE_BY" not in type(self).__dict__:  # derived by someone else
            return super().__reduce_ex__(protocol)
        return _rebuild, type(self).MADE_BY, self.state()

    def state(self) -> dict[str, Any]:
        return self.__dict__.copy()


def _rebuild(make: Callable[..., type], arguments: tuple[Any, ...]) -> Any:
    cls: Any = make(*arguments)
    return object.__new__(cls)


class _MakesHosts(type):
    """Calling a class that replaces a host's makes a module of the host: what a swapped model's class is called for."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        served = _served_base(cls)
        return super().__call__(*args, **kwargs) if served is None else _without(cls, served)(*args, **kwargs)

    def __setattr__(cls, name: str, value: Any) -> None:
        """What others put on the class of a swapped model, they mean for the host's."""
        super().__setattr__(name, value)
        ours = cls.__dict__.get("OURS")
        if name == "forward" and ours is not None:
            setattr(cls.host, name, cls.ORIGINAL if value is ours else value)  # type: ignore[attr-defined]


class ServedModule(MadeAtRunTime, metaclass=_MakesHosts):
    """Base of the classes that replace a host's."""

    host: ClassVar[type[nn.Module]]
    SERVES: ClassVar[str]
    # The forward that serves, and the host's that it was written for.
    OURS: ClassVar[Callable[..., Any]]
    ORIGINAL: ClassVar[Callable[..., Any]]


def runs_ours(cls: Any) -> bool:
    """A served class runs our forward: nobody has derived another from it, or has changed it or the host's since."""
    return cls.forward is cls.OURS and cls.host.forward is cls.ORIGINAL


class ServedProcessor:
    """Base of the processors that replace a host's, which they keep as ``host``."""

    host: Any
    SERVES: ClassVar[str]  # which operators, for the report


class ServingHook:
    """Base of hooks that belong to the swap: before every call of a module, and after it, however it ended."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    handle: Any = None

    def begin(self) -> None:
        """The module is swapped in."""

    def end(self) -> None:
        """The module is swapped out."""

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """
        Args:
            args, kwargs: as the hooks of others have left them.
            output: None if the call failed.
        """
        raise NotImplementedError


class _After:
    """The second half of a hook, which a module keeps in a dict of its own."""

    def __init__(self, hook: ServingHook) -> None:
        self.hook = hook
        self.handle: Any = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.hook.after(module, args, kwargs, output)


OUR_HOOKS = (ServingHook, _After)

# Told of every class that takes the place of a host's, with the host's: hosts look classes up in tables of their own.
MADE: list[Callable[[type, type], None]] = []


CHANGED_CLASS = "the host's class was changed since"
IN_MODE = "called under a torch function mode, which may stand for functions that vdcore does not call"


# Torch's own modes that let its functions be: for a default device, exporting and tracing.
_LETTING_BE = ("torch.utils._device", "torch.export.", "torch._export.", "torch.fx.")


def in_function_mode() -> bool:
    """Somebody takes torch's functions over, other than for a default device, or to trace them."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return not all(type(mode).__module__.startswith(_LETTING_BE) for mode in _get_current_function_mode_stack())


@lru_cache(maxsize=256)
def served_class(host: Any, forward: Any, serves: str) -> type[nn.Module]:
    """The host's class with another forward. It keeps the name, by which hosts save and load.

    Args:
        forward: takes the arguments of the host's forward, and returns its result, or the reason, a ``str``, why the
            host's own forward has to run; or :class:`Renamed`.
    """
    run = forward.of(host) if isinstance(forward, Renamed) else forward
    original = host.forward

    @wraps(original)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Swapped out since, a hook may have kept its forward.
        if TURN.is_hosts or not isinstance(self, ServedModule):
            return original(self, *args, **kwargs)
        if host.forward is not original and type(self).forward is replaced:
            note_left(self, CHANGED_CLASS)
            return host.forward(self, *args, **kwargs)
        out = run(self, *args, **kwargs)
        if isinstance(out, str):
            note_left(self, out)
            return original(self, *args, **kwargs)
        return out

    names = {
        "forward": replaced,
        "host": host,
        "SERVES": serves,
        "OURS": replaced,
        "ORIGINAL": original,
        "MADE_BY": (served_class, (host, forward, serves)),
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    made = new_class(host.__name__, (ServedModule, host), {}, lambda space: space.update(names))
    for tell in MADE:
        tell(made, host)
    return made


# ---- Which class of a host a module is of ----


def known_as(cls: type, known: Iterable[type], method: str = "forward") -> type | str | None:
    """The class of those that are known whose method a class runs.

    A class that is derived from a known one is as good as it as long as the method is inherited, such as those that
    sharding makes. One with a method of its own is another thing: the reason says so. None: derived from none of them.
    """
    known = set(known)
    for base in cls.__mro__:
        if base in known:
            if getattr(cls, method) is getattr(base, method):
                return base
            return f"{cls.__name__} is derived from {base.__name__} with a {method} of its own"
    return None


def is_of(module: Any, *known: type, method: str = "forward") -> bool:
    """What runs in a module, served or not, is the method of one of these classes."""
    return type(module) in known or isinstance(known_as(host_type(module), known, method), type)


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


def globals_used(function: Callable[..., Any]) -> dict[str, Any]:
    """Globals that a Python function reads, and what they are; none of functions that it calls."""
    code, scope = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None:
        return {}
    read = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return {name: scope[name] for name in read if name in scope}


def decorated(function: Callable[..., Any]) -> str | None:
    """A reason if a function stands around another, which would be lost in a copy of that one."""
    if inspect.unwrap(function) is function:
        return None
    return f"{getattr(function, '__qualname__', function)} has a decorator"


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
        run = rebind(host.forward, dict(self.functions))

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return run(module, *args, **kwargs)
            token = running.set(module)
            try:
                return run(module, *args, **kwargs)
            finally:
                running.reset(token)

        return forward

    def find(self, name: str, module: nn.Module) -> list[Change] | str | None:
        forward = type(module).forward
        if not set(globals_used(inspect.unwrap(forward))) & set(dict(self.functions)):
            return None
        reason = decorated(forward) or changed_forward(module)
        return reason or [Change.of_forward(module, self, self.serves)]


# ---- Changes ----

SHARED = "vdcore_shared"  # the name of what the modules of one swap share, in each of them


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
    def of_forward(module: nn.Module, forward: Any, serves: str, shared: Any = None) -> Change:
        """As :func:`served_class` has them.

        Args:
            shared: what the forward finds in the module as :data:`SHARED`.
        """
        return Change(module, partial(_serve_with, forward=forward, serves=serves, shared=shared), restore)

    @staticmethod
    def of_hook(module: nn.Module, hook: ServingHook) -> Change:
        return Change(module, partial(_watch_with, hook=hook), restore)

    def make(self) -> None:
        self.do(self.module)


def _serve_with(module: Any, forward: Any, serves: str, shared: Any) -> None:
    if shared is not None:
        module.__dict__[SHARED] = shared
    module.__dict__.pop("forward", None)  # the class's own, as changed_forward() has found
    host: Any = type(module)
    module.__class__ = served_class(host, forward, serves)


def _watch_with(module: nn.Module, hook: ServingHook) -> None:
    # With their handles, that a pickle's hooks keep their numbers for themselves in another process.
    hook.begin()
    after = _After(hook)
    hook.handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    after.handle = module.register_forward_hook(after, with_kwargs=True, always_call=True)


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
    forward = module.__dict__.get("forward")
    # A hook that was removed leaves the forward of the class on the module.
    if forward is None or (isinstance(forward, MethodType) and forward.__func__ is type(module).forward):
        return None
    return "its forward is replaced already, by a hook or by offloading"


def is_plain(module: nn.Module) -> bool:
    """Nothing but its forward runs when the module is called, so that its parameters may be used without it.

    They are tensors of torch itself: those of quantization, offloading and sharding are for their module alone.
    """
    # Asked several times a block: one chain of looks takes half the time of a tuple and any().
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return not ("forward" in module.__dict__ or has_global_hooks()) and has_plain_parameters(module)


_GLOBAL_HOOKS = (
    *(torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks),
    *(torch_module._global_backward_pre_hooks, torch_module._global_backward_hooks),
)


def has_global_hooks() -> bool:
    """Others hook every module there is. Torch's own count and track modules, and look at no tokens."""
    return any(_GLOBAL_HOOKS) and not all(is_from(x, "torch.") for hooks in _GLOBAL_HOOKS for x in hooks.values())


def is_from(hook: Any, *packages: str) -> bool:
    """A hook is a function, or an object of a class, of one of these packages."""
    named = hook if hasattr(hook, "__qualname__") else type(hook)
    return str(named.__module__).startswith(packages)


_PLAIN = (nn.Parameter, Tensor, FakeTensor)


def has_plain_parameters(module: nn.Module) -> bool:
    for x in module._parameters.values():  # noqa: SIM110  half the time of all()
        if x is not None and type(x) not in _PLAIN:
            return False
    return True


def host_type(module: nn.Module) -> type[nn.Module]:
    """The host's class of a module, swapped or not."""
    served = _served_base(type(module))
    return type(module) if served is None else served.host


def _served_base(cls: type) -> type[ServedModule] | None:
    """The class of the swap that a class is, or is derived from."""
    return next((base for base in cls.__mro__ if issubclass(base, ServedModule) and "host" in base.__dict__), None)


def is_served(module: nn.Module) -> bool:
    return isinstance(module, ServedModule) or isinstance(getattr(module, "processor", None), ServedProcessor)


def restore(module: Any) -> None:
    """Undoes the changes of one module. Restoring what was never changed does nothing, and others' changes stay."""
    served: Any = _served_base(type(module))
    if served is not None:
        forward = module.__dict__.get("forward")
        if isinstance(forward, MethodType) and forward.__func__ is served.forward:
            del module.__dict__["forward"]  # left there by a hook that was removed
        module.__class__ = _without(type(module), served)
        module.__dict__.pop(SHARED, None)
    processor = module.__dict__.get("processor")
    if isinstance(processor, ServedProcessor):
        module.processor = processor.host
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, ServingHook):
            hook.end()
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _After):
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def _without(cls: type, served: type[ServedModule]) -> type:
    """A class with the host's in the place of ours, which others may have derived theirs from since."""
    if cls is served:
        return served.host
    bases = tuple(_without(base, served) if issubclass(base, served) else base for base in cls.__bases__)
    names = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return new_class(cls.__name__, bases, {}, lambda space: space.update(names))


# ---- Swapping models ----

# The changes that serve a module of this name, children included where they go together; or the reason why it is left;
# or None if it is none of the host's that vdcore could serve.
Find = Callable[[str, nn.Module], "list[Change] | str | None"]


def swap(
    models: Iterable[tuple[str, nn.Module, Find]],
    report: Report | None = None,
    hooks: Sequence[Change] = (),
    stacklevel: int = 3,
) -> Report:
    """Changes all modules for which changes are found, or none of any model if one fails.

    Args:
        models: each with the prefix of its modules' names in the report.
        hooks: changes that come with the swap, and are not reported.
        stacklevel: of the warning that nothing is served, which is for whoever called the host's ``swap_in``.
    """
    report = Report() if report is None else report
    models = list(models)
    changes: list[Change] = []
    served: list[tuple[str, Any]] = []
    planned: set[nn.Module] = set()  # of all models: a pipeline may hold one under two names
    for prefix, model, find in models:
        for name, module in named_modules(model):
            found = None if module in planned or is_served(module) else find(name, module)
            if isinstance(found, str):
                report.add_left(prefix + name, type(module).__name__, found)
            elif found:
                for change in found:
                    if change.module not in planned:  # a model may use one twice
                        planned.add(change.module)
                        changes.append(change)
            if module in planned or is_served(module):
                served.append((prefix + name, module))
    make_all([*changes, *hooks])
    for name, module in served:
        serving = [module, *(x for x in (getattr(module, "processor", None),) if isinstance(x, ServedProcessor))]
        report.add_served(name, type(module).__name__, serving[-1].SERVES, *serving)
    dtypes = {x.dtype for _, model, _ in models for x in model.parameters() if x.device.type == "cpu"}
    report.notes += [note for dtype in dtypes if (note := slow_dtype(dtype)) is not None]
    if not report.served:
        warn(f"swap_in: nothing is served by vdcore\n{report}", stacklevel=stacklevel)
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
