"""The suite's tables: the card's ceilings, what was right and what was not, and the best rows of the sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from vdcore_bench.measure.journal import SWEEP, Row
from vdcore_bench.report.table import Table
from vdcore_bench.suites.gpu.plan import PARTS

MOST = 12  # failures shown; results.jsonl has them all


def tables(rows: Iterable[Row]) -> list[Table]:
    """Without rows of this suite, none."""
    rows = list(rows)
    rates, counts, bad = [], [], []
    for row in rows:
        if row.op == "ceiling" and row.p50:
            gigabytes, teraflops = (row.bytes or 0.0) / row.p50 / 1e9, (row.flops or 0.0) / row.p50 / 1e12
            rates.append((row.provider, f"{gigabytes:.0f} GB/s" if row.bytes else f"{teraflops:.0f} TFLOP/s"))
        if row.status == "failed" and (row.op in PARTS or row.metric in ("error", "tests")):
            bad.append((row.op, row.case, row.dtype, row.status, row.reason, row.error_ratio))
    for what, metric in (("correctness", "error"), ("contract", "tests")):
        chosen = [r for r in rows if r.metric == metric]
        failed = sum(r.status == "failed" for r in chosen)
        worst = max((r.error_ratio or 0.0 for r in chosen), default=0.0)
        counts.append((what, f"{failed} of {len(chosen)}", worst or None)) if chosen else None
    made = [
        Table.of(("ceiling", "rate"), rates, "Ceilings of this GPU"),
        Table.of(("part", "failed", "worst error ratio"), counts, "Correctness"),
        Table.of(
            ("part or operator", "case", "dtype", "status", "why", "error ratio"), bad[:MOST], "Failed", text=True
        ),
        swept(rows),
    ]
    return [table for table in made if table.rows]


def swept(rows: Iterable[Row]) -> Table:
    """The fastest row of every swept config table, beside the row that it has."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.case.startswith(SWEEP) and row.p50:
            groups[row.case.removeprefix(SWEEP), row.workload, row.mode].append(row)
    cells = []
    for (table, workload, mode), of_table in groups.items():
        best = min(of_table, key=lambda row: row.p50 or 0.0)
        now = next((row for row in of_table if row.provider == "table"), best)
        gain = (now.p50 or 0.0) / (best.p50 or 1.0)
        cells.append((table, workload, mode, now.variant, best.variant, f"{gain:.2f}x"))
    header = ("config table", "workload", "mode", "its row", "fastest", "gain")
    return Table.of(header, cells, "Sweep of config rows", text=True)
