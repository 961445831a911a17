"""What is read from machine code, and the model that makes an estimate of it."""

import json
import types
from pathlib import Path

import pytest

pytest.importorskip("triton")

from vdcore_bench import machine_code
from vdcore_bench.machine_code import Code, code_of, ctas_per_sm, estimate, filled, sparse, variant_of

TABLES = sorted((Path(__file__).parents[2] / "bench" / "results" / "machine_code").glob("*.json"))

SASS = """
        /*0010*/                   S2R R0, SR_CTAID.X ;   /* 0x00 */
                                                          /* 0x01 */
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0070*/              @P1  LDGSTS.E [R9], desc[UR4][R2.64] ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
"""


def test_the_order_and_widths_of_loads_are_read():
    code = code_of(SASS)
    assert code == Code("LLLBAABMM", (16, 16, 2, 16, 4), 12)
    assert code.first == (16, 16, 2) and code.copies == (16, 4)
    assert code.trips(1000) == 2 and code.trips(34) == 1
    assert [Code("LLMLBL", (16,) * 4, 6).trips(most) for most in (0, 32, 33, 48, 64)] == [0, 1, 2, 2, 3]
    what = {"arch": "sm_90", "programs": 10_000, "bytes": 10**9, "flops": 0}
    row = filled(what, code, regs=70, spills=0, shared=8192, warps=4)
    assert row["bytes_in_flight"] == row["ctas_per_sm"] * 4 * 32 * 3 * 16
    assert (row["barriers"], row["async_copy_bytes"], row["mma"], row["trips"]) == (2, 4, 2, 2)
    assert (row["estimate"], row["bound_by"]) == estimate(row)


@pytest.mark.parametrize(
    ("arch", "regs", "warps", "shared", "ctas"),
    [
        ("sm_90", 71, 4, 20_480, 7),  # registers
        ("sm_90", 32, 4, 110_000, 2),  # shared memory
        ("sm_90", 24, 4, 0, 16),  # warps
        ("sm_89", 24, 4, 0, 12),
        ("sm_89", 24, 1, 0, 24),
        ("sm_86", 24, 1, 0, 16),
        ("sm_87", 24, 1, 0, 16),
        ("sm_87", 24, 4, 0, 12),
        ("sm_87", 24, 4, 80_000, 2),
        ("sm_101", 24, 1, 0, 24),
        ("sm_103", 24, 1, 0, 32),
        ("sm_120", 24, 8, 101_376, 1),
        ("sm_90", 24, 1, 0, 32),
        ("sm_80", 255, 8, 0, 1),
    ],
)
def test_programs_of_a_multiprocessor(arch, regs, warps, shared, ctas):
    assert ctas_per_sm(arch, regs, warps, shared) == ctas


@pytest.mark.parametrize(
    ("lines", "frames", "channels", "tensors", "ctas", "trips", "barriers", "code", "warps", "grid", "share", "bound"),
    [
        (4, 16, 72, 4, 7, 5, 15, 928, 4, 4096, 0.85, "bandwidth"),  # Latte forward
        (2, 16, 72, 7, 5, 7, 31, 1120, 4, 8192, 0.61, "latency"),  # and backward
        (1, 28, 128, 4, 4, 3, 35, 1008, 4, 10**6, 0.74, "latency"),  # Mochi
        (1, 28, 128, 4, 6, 1, 19, 912, 4, 10**6, 0.90, "bandwidth"),  # the same with its loads first
    ],
)
def test_the_model(lines, frames, channels, tensors, ctas, trips, barriers, code, warps, grid, share, bound):
    """Its figures by hand."""
    raw = {"ctas_per_sm": ctas, "barriers": barriers, "warps": warps, "trips": trips, "instructions": code, "mma": 0}
    raw |= {"programs": grid, "bytes": lines * frames * channels * 2 * tensors * grid, "flops": 0}
    found, by = estimate(raw)
    assert (found, by) == (pytest.approx(share, abs=0.03), bound)


def test_what_is_multiplied_stands_beside_the_estimate():
    raw = {"ctas_per_sm": 1, "barriers": 0, "warps": 8, "trips": 1, "instructions": 1000, "mma": 10}
    row = machine_code.code.derived(raw | {"programs": 10_000, "bytes": 1e6, "flops": 1e12})
    assert row["estimate"] == pytest.approx(model(row), abs=1e-3) and row["bound_by"] == "issue"
    assert row["flops_bound_by"] == "compute" and 0.9 < row["flops_estimate"] <= 1
    slower = machine_code.code.derived(row | {"instructions": 2000})
    assert slower["estimate"] < row["estimate"] and slower["flops_estimate"] == row["flops_estimate"]
    copied = machine_code.code.derived(row | {"flops": 0})
    assert (copied["flops_estimate"], copied["flops_bound_by"]) == (copied["estimate"], copied["bound_by"])


LOOPS = """
        /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/                   FADD R1, R2, R3 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   FADD R1, R2, R3 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0080*/               @P1 BRA 0x50 ;
        /*0090*/               @P2 BRA 0x10 ;
        /*00a0*/                   FADD R1, R2, R3 ;
        /*00b0*/               @P2 BRA 0xa0 ;
        /*00c0*/                   BRA 0xc0 ;
"""


RARELY = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   VOTE.ANY P0, P1 ;
        /*0030*/              @!P0 BRA 0x90 ;
        /*0040*/                   PMTRIG 0x1 ;
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0070*/              @P1  BRA 0x50 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00a0*/               @P2 EXIT ;
        /*00b0*/                   BRA P1, 0xd0 ;
        /*00c0*/                   FADD R1, R2, R3 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0 ;
"""


def test_what_only_a_rare_branch_reaches_is_not_counted():
    assert code_of(RARELY) == Code("LM", (16,), 8)
    always = RARELY.replace("PMTRIG", "NOP")
    assert code_of(always) == Code("LLMBM", (16, 16), 14, ((3, 1),))


def test_innermost_loops_that_multiply_are_found_in_their_order():
    assert code_of(LOOPS).loops == ((3, 1), (4, 2)) and code_of(SASS).loops == ()


def test_the_time_of_a_visible_pair():
    """By hand: 128 x 64 pairs of 128 channels take 0.692 us by their products, 0.98 by 600 instructions of 8 warps."""
    what = {"arch": "sm_90", "kernel": "f", "programs": 100, "bytes": 10**9, "flops": 10**9}
    job = types.SimpleNamespace(forward_flops=lambda: 4.0 * 128 * 8192 * 1000, shape=types.SimpleNamespace(D=128))
    row = filled(what, code_of(SASS), regs=70, spills=0, shared=0, warps=8)
    code = Code("M", (), 1000, ((400, 12), (1200, 24)))  # the second one is unrolled
    found = machine_code.code.by_pairs(row, code, sparse.Walk(900, 200, 4 * 128 * 64 * 128), job)
    assert (found["whole_instructions"], found["tested_instructions"]) == (400, 600)
    us = (900 * 0.692 + 200 * 600 * 8 / 4900) / 132
    assert found["pair_ps"] == pytest.approx(us / (8192 * 1000) * 1e6, rel=1e-3)
    assert found["pairs"] == 8192 * 1000 and machine_code.code.derived(found) == found
    with pytest.raises(ValueError, match="1 loops of products"):
        machine_code.code.by_pairs(row, Code("M", (), 9, ((4, 1),)), sparse.Walk(1, 1, 1), job)


def test_tiles_are_those_that_kernels_walk_through():
    """Of dense attention all; of windows those of the tables; of lists those that are listed, in boxes."""
    from vdcore_bench.aot import phases_of

    found = {}
    for job in machine_code.jobs(("video_attention", "tile_attention")):
        if job.workload.name == "wan2.2-5b-704p":
            for launch in phases_of(job, "sm_90")["fwd"]:
                found[variant_of(job)] = sparse.walk_of(job, launch), job
                assert launch.arguments["TILE"].BM == 128 and launch.arguments["TILE"].BN == 64
    tokens, heads = 31 * 22 * 40, 24
    assert found["plain"][0].whole == heads * -(-tokens // 128) * (tokens // 64)
    for walk, job in found.values():
        assert (walk.whole + walk.tested) * 128 * 64 >= heads * job.pairs()
    tiles = 8 * 3 * 5
    assert found["lists"][0] == sparse.Walk(heads * tiles * (tiles // 4) * 2 * 4, 0, 4 * 128 * 64 * 128)


def test_the_benchmarks_and_masks_are_all_there():
    found = [(job.op, job.workload.name, variant_of(job)) for job in machine_code.jobs()]
    windows = {(op, name, kind) for name in sparse.WORKLOADS for op, kind in SPARSE}
    assert windows <= set(found)
    assert len(found) == len(set(found)) > 20
    assert {"plain", "norm+rope", "causal", "window", "chunks"} <= {variant for _, _, variant in found}


@pytest.mark.parametrize("arch", ["sm_9000", "sm_42", "sm_75", "sm_9", "sm_99", "gfx942", "hopper"])
def test_unknown_architectures_are_errors(arch):
    with pytest.raises(ValueError, match=f"from sm_80 on, such as sm_80, .* got '{arch}'"):
        machine_code.report([arch])


@pytest.mark.parametrize("arch", [*machine_code.ARCHS, "sm_86", "sm_87", "sm_103"])
def test_architectures_are_known(arch):
    assert machine_code.code.known(arch) and machine_code.code.chip_of(arch).most < 233_472


# ---- The committed tables ----

FIELDS = (
    *("op", "mode", "backend", "dtype", "variant", "workload", "kernel", "arch", "auto", "regs", "spills", "shared"),
    *("ctas_per_sm", "warps", "loads_before_barrier", "load_bytes", "bytes_in_flight", "barriers", "async_copy_bytes"),
    *("mma", "estimate", "bound_by", "programs", "bytes", "flops", "trips", "instructions"),
    *("flops_estimate", "flops_bound_by"),
)
BY_PAIRS = {
    *("pairs", "tile_flops", "whole_tiles", "tested_tiles", "whole_instructions", "tested_instructions", "pair_ps")
}
SPARSE = [(f"{kind}_attention", v) for kind, v in zip(["video"] * 3 + ["tile"], ("tokens", "tiles", "radial", "lists"))]


def model(row):
    """A share of copy, as bytes of a program, trips, barriers and instructions make it."""
    bandwidth = row["bytes"] / row["programs"] / 32.6e3
    latency = (row["trips"] * 0.8 + row["barriers"] * 0.04 + 0.6) / row["ctas_per_sm"]
    issue = row["instructions"] * row["warps"] / 4 / 1.75e3 / 0.7
    waves = row["programs"] / (132 * row["ctas_per_sm"])
    full = (waves / (int(waves) + (waves % 1 > 0)) + 1) / 2 if waves < 6 else 1.0
    return 0.92 * bandwidth / max(bandwidth, latency, issue) * full


@pytest.fixture(scope="module", params=TABLES, ids=lambda path: path.stem)
def table(request):
    return json.loads(request.param.read_text())


def test_there_is_a_table_of_every_architecture():
    assert {path.stem for path in TABLES} == set(machine_code.ARCHS)
    assert all({row["arch"] for row in json.loads(path.read_text())} == {path.stem} for path in TABLES)


def test_rows_say_everything_in_whole_numbers(table):
    for row in table:
        assert set(row) - BY_PAIRS == set(FIELDS) and (set(row) >= BY_PAIRS or not BY_PAIRS & set(row))
        numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}
        shares = ("estimate", "flops_estimate", "pair_ps")
        assert all(isinstance(x, int) for name, x in numbers.items() if name not in shares)
        flight = row["ctas_per_sm"] * row["warps"] * 32 * row["loads_before_barrier"] * row["load_bytes"]
        assert row["bytes_in_flight"] == flight and 0 <= row["estimate"] <= 1
        assert 0 <= row["flops_estimate"] <= 1


def test_estimates_of_all_rows_are_the_model_s(table):
    assert any(row["flops"] for row in table) and not all(row["flops"] for row in table)
    for row in table:
        assert row["estimate"] == pytest.approx(model(row), abs=6e-4), row
        assert machine_code.code.derived(row) == row


def test_nothing_of_a_table_fails_and_every_job_is_in_it(table):
    assert not [row for row in table if row["bound_by"].startswith("it fails") or not row["regs"]]
    jobs = {(job.op, job.workload.name, variant_of(job), "bwd") for job in machine_code.jobs() if job.has_backward}
    of = {
        backend: {(r["op"], r["workload"], r["variant"], r["mode"]) for r in table if r["backend"] == backend}
        for backend in ("triton", "cuda")
    }
    assert jobs <= of["triton"]
    assert {job for job in jobs if job[0] == "temporal_attention"} <= of["cuda"] <= of["triton"]


def test_windows_and_lists_stand_beside_dense_attention_by_pairs(table):
    by_pairs = {
        (r["workload"], r["variant"], r["kernel"].partition("_attention_")[2]): r for r in table if "pairs" in r
    }
    for workload in sparse.WORKLOADS:
        for kernel in ("fwd_kernel", "bwd_q_kernel", "bwd_kv_kernel"):
            dense = by_pairs[workload, "plain", kernel]
            assert dense["pair_ps"] > 0
            for _, variant in SPARSE:
                row = by_pairs[workload, variant, kernel]
                assert not row["spills"] and row["pairs"] < dense["pairs"] and row["pair_ps"] > 0


def test_the_documentation_says_what_the_table_of_hopper_says():
    rows = json.loads(next(path for path in TABLES if path.stem == "sm_90").read_text())
    text = (Path(__file__).parents[2] / "docs" / "sparse.md").read_text()
    assert "\n".join(sparse.over_dense(rows)) in text
