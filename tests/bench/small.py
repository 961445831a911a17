"""Small jobs and rows that the benchmark's tests share."""

from vdcore_bench.jobs import JOBS, make
from vdcore_bench.measure.journal import Row
from vdcore_bench.workloads import Shape, load

TINY = Shape(B=1, T=5, rows=2, columns=3, H=4, G=4, D=24, L=7)
WORKLOADS = {"video_attention": "hunyuanvideo-720p"}  # the rest: one with patches, text, norm and rope


def tiny_job(op, workload=None, *, shape=TINY, **kwargs):
    return make(op, load()[workload or WORKLOADS.get(op, "stdit3-720p-102f")], shape=shape, **kwargs)


def every_op():
    return list(JOBS)


def row(provider="vdcore[cpu]", p50=2.0, **kwargs):
    values = {
        "op": "temporal_attention",
        "workload": "latte-1-512",
        "provider": provider,
        "mode": "fwd",
        "variant": "auto" if provider.startswith("vdcore") else "strided",
        "p20": p50 and p50 * 0.98,
        "p50": p50,
        "p80": p50 and p50 * 1.02,
        "samples": 9,
        "error_ratio": 0.5,
        "shape": {"B": 1, "T": 16, "S": 64, "H": 2, "D": 8},
        "versions": {"cpu": "a processor", "torch": "2"},
    }
    return Row(**{**values, **kwargs})
