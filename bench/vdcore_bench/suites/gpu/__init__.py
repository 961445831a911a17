"""``vdcore bench gpu``; where there is nothing but torch and triton, ``python -m vdcore_bench.suites.gpu``.

Correctness of every operator, the contract tests that need a GPU, the card's ceilings, all operators against all
installed peers on models' shapes, memory against frames, and a sweep of config rows: each part in processes of its own,
so that one that crashes or hangs is a row that says so, and the suite goes on behind it. Rows go to results.jsonl as
they come. ``--dry`` runs every part without a GPU, on a stub of the driver: launches, and no results.
"""

from vdcore_bench.suites.gpu.conductor import TAKES, run, why_not
from vdcore_bench.suites.gpu.plan import FRAMES, ITEMS, PARTS, tests
from vdcore_bench.suites.gpu.tables import tables

__all__ = ["FRAMES", "ITEMS", "PARTS", "TAKES", "run", "tables", "tests", "why_not"]
