"""Packages that only some parts need: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, extra: str, user: str) -> Any:
    """Imports a module of an extra.

    Args:
        module: what to import, such as ``"av"``.
        extra: the extra of vdcore that installs it.
        user: the function that needs it, for the message.

    Raises:
        ImportError: where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(f"{user}: needs {module}, missing here: pip install 'vdcore[{extra}]'") from None
