"""What train, sample and demo share: errors in one line, and options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

DEVICE = Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")]
TRAIN_OUT = Path("out/train")  # where train leaves its checkpoint, and sample looks for it


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can act on become one line and exit code 1; any other exception is a bug, and shown whole."""
    from vdcore.parallel.messages import ExchangeError

    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, ExchangeError) as error:
        print(f"vdcore: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
