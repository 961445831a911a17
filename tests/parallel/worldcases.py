"""A world of ranks is started once, runs all of its cases, and tells how each went."""

import importlib
import traceback

import judging

MODULES = ("exchanges", "attentions", "vdits_on_ranks")


def names(thorough, modules=MODULES):
    """``module.case`` of all cases."""
    found = []
    for name in modules:
        module = importlib.import_module(name)
        found += [f"{name}.{case}" for case in (*module.CASES, *(module.SLOW if thorough else ()))]
    return found


def run_cases(mesh, cases, thorough):
    """On every rank: case -> None, or what went wrong. After a failure nobody knows where the others are: it ends."""
    judging.THOROUGH[0] = thorough
    found = {}
    for name in cases:
        module, _, case = name.partition(".")
        module = importlib.import_module(module)
        try:
            {**module.CASES, **module.SLOW}[case](mesh)
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
            return found
    return found
