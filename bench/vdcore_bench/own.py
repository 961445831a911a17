"""Functions of the user's own, named as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def own_function(spec: str) -> Callable[..., Any]:
    """The function of ``"module:function"``; the module may lie in the working directory.

    Raises:
        ValueError: if there is no such module, if importing it fails, or if it has no such function.
    """
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{spec}: expected module:function, and importing {module!r} failed: {what}") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise ValueError(f"{spec}: expected module:function, and {module} has no function {name!r}")
    function: Callable[..., Any] = found
    return function
