"""Worlds of ranks: each is started once, runs all of its cases, and tells how each went."""

import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))


def run_cases(mesh, modules):
    """On every rank: name of a case -> None, or what went wrong. After a failure nobody can say where the others are."""
    found = {}
    for module in modules:
        for name, case in __import__(module).CASES.items():
            begin = time.perf_counter()
            try:
                case(mesh)
                found[name] = (None, time.perf_counter() - begin)
            except BaseException:
                found[name] = (traceback.format_exc(), time.perf_counter() - begin)
                return found
    return found
