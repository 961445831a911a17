"""What is read from machine code, and the model that makes an estimate of it."""

import pytest

pytest.importorskip("triton")

from vdcore_bench import machine_code
from vdcore_bench.machine_code import Code, code_of, ctas_per_sm, estimate, raw_fields, variant_of

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
    assert code == Code("LLLBAAB", (16, 16, 2), (16, 4), 2, 12)
    assert code.trips == 2
    fields = raw_fields("sm_90", code, 70, 0, 8192, 4)
    assert fields["bytes_in_flight"] == fields["ctas_per_sm"] * 4 * 32 * 3 * 16
    assert (fields["barriers"], fields["async_copy_bytes"], fields["mma"]) == (2, 4, 2)


@pytest.mark.parametrize(
    ("arch", "regs", "warps", "shared", "ctas"),
    [
        ("sm_90", 71, 4, 20_480, 7),  # registers
        ("sm_90", 32, 4, 110_000, 2),  # shared memory
        ("sm_90", 24, 4, 0, 16),  # warps
        ("sm_89", 24, 4, 0, 12),
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
    raw = {"ctas_per_sm": ctas, "barriers": barriers, "warps": warps}
    read = Code("LB" * trips, (), (), 0, code)
    found, by = estimate(raw, read, grid, lines * frames * channels * 2 * tensors * grid, 0.0)
    assert (found, by) == (pytest.approx(share, abs=0.03), bound)


def test_kernels_that_multiply_are_held_to_the_peak_too():
    raw = {"ctas_per_sm": 1, "barriers": 0, "warps": 8}
    share, by = estimate(raw, Code("L", (16,), (), 10, 1000), 10_000, 1e6, 1e12)
    assert by == "compute" and 0.9 < share <= 1


def test_the_benchmarks_and_masks_are_all_there():
    found = [(job.op, job.workload.name, variant_of(job)) for job in machine_code.jobs()]
    assert len(found) == len(set(found)) > 20
    assert {"plain", "norm+rope", "causal", "window", "chunks"} <= {variant for _, _, variant in found}


def test_unknown_architectures_are_errors():
    with pytest.raises(ValueError, match="sm_9000"):
        machine_code.report(["sm_9000"])
