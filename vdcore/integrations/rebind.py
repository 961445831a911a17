"""A host's function with some of the names that it uses meaning something else, and modules whose forward is one.

Nothing outside of the copied function sees the new meanings, so that two models of a host can differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from types import FunctionType
from typing import Any, ClassVar

from torch import nn


def rebind(function: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """A copy of a Python function in which these global names mean these values."""
    plain: Any = inspect.unwrap(function)
    scope = {**plain.__globals__, **names}
    # Without a name of its module torch.compile takes these globals, and not the module's.
    scope.pop("__name__", None)
    copied = FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    copied.__kwdefaults__ = plain.__kwdefaults__
    return copied


class ReboundModule:
    """Base of the classes that replace a host's."""

    host: ClassVar[type[nn.Module]]
    table: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).host, type(self).table), self.__dict__.copy()


# What names mean, by the adapter that says so: a pickle names the adapter.
TABLES: dict[str, dict[str, Any]] = {}


@lru_cache(maxsize=64)
def _class(host: Any, table: str) -> Any:
    forward = rebind(host.forward, TABLES[table])

    @wraps(host.forward)
    def rebound(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    names = {"forward": rebound, "host": host, "table": table, "__module__": host.__module__, "__doc__": host.__doc__}
    return type(host.__name__, (ReboundModule, host), names)


def _rebuild(host: Any, table: str) -> Any:
    __import__(table)
    cls = _class(host, table)
    return cls.__new__(cls)


def swap_names(model: nn.Module, table: str) -> list[str]:
    """Gives every module whose forward uses one of the table's names a class in which they mean the table's values.

    Returns the paths of these modules.
    """
    found = []
    for path, module in model.named_modules():
        if isinstance(module, ReboundModule):
            found.append(path)
            continue
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and "forward" not in module.__dict__ and set(TABLES[table]) & set(code.co_names):
            cls: Any = type(module)
            module.__class__ = _class(cls, table)
            found.append(path)
    return found


def restore_names(model: nn.Module) -> None:
    """Undoes :func:`swap_names`."""
    for module in model.modules():
        if isinstance(module, ReboundModule):
            module.__class__ = type(module).host  # type: ignore[assignment]
