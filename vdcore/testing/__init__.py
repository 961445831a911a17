"""What tests, benchmarks and users share to judge a backend: one tolerance rule, layouts, cases of every operator.

A new operator joins every contract test by adding its cases to :data:`CASES`, and a new backend by existing.
"""

from vdcore.testing.cases import CASES, TORCH_FORMS, Case, Inputs, cases_of
from vdcore.testing.layouts import LAYOUTS, lay_out
from vdcore.testing.run import Outcome, check, draws, judge, run, truth
from vdcore.testing.tangents import directions, judge_tangents, of_leaves, pushed, quotients
from vdcore.testing.tolerance import Errors, Ratio, error_ratio, errors, pooled, ratio, ulp

__all__ = [
    "CASES",
    "LAYOUTS",
    "TORCH_FORMS",
    "Case",
    "Errors",
    "Inputs",
    "Outcome",
    "Ratio",
    "cases_of",
    "check",
    "directions",
    "draws",
    "error_ratio",
    "errors",
    "judge",
    "judge_tangents",
    "lay_out",
    "of_leaves",
    "pooled",
    "pushed",
    "quotients",
    "ratio",
    "run",
    "truth",
    "ulp",
]
