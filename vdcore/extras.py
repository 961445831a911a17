"""Packages that only some parts need: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# Extra -> the modules that its commands and functions import.
EXTRAS = {
    "bench": ("typer", "rich", "matplotlib", "psutil"),
    "models": ("diffusers", "transformers", "safetensors"),
    "video": ("av", "cv2"),
}


def installed(module: str) -> bool:
    """Whether a top-level module can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a finder that refuses it; a module without a spec
        return False


def missing(extra: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra] if not installed(module)]


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'vdcore[{extra}]'"


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
        raise ImportError(f"{user}: needs {module}, missing here: {install(extra)}") from None
