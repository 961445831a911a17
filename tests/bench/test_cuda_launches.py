"""What calls of the CUDA kernels would launch, by the launchers' own plans: recorded, on tensors of the CPU."""

import pytest
import torch

import vdcore
from vdcore.ops import cuda

pytest.importorskip("triton")

from vdcore_bench import machine_code
from vdcore_bench.machine_code import cuda as rows

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"cuda: {cuda.missing()}")


def job(op, workload, *, norm_rope=False):
    """The model's own, without another mask."""
    found = (job for job in machine_code.jobs() if (job.op, job.workload.name) == (op, workload))
    return next(job for job in found if job.norm_rope == norm_rope)


# Four warps of a block, 16 frames a warp: Latte-1 has 1,024 positions x 16 heads, Mochi 1,590 x 24 of two tiles each.
@pytest.mark.parametrize(
    ("workload", "given", "mode", "kernel", "blocks", "tensors"),
    [
        ("latte-1-512", {}, "fwd", "temporal_forward_kernel<bf16, 2, 3, (Fused)0>", 1024 * 16 // 4, 4),
        ("latte-1-512", {}, "bwd", "temporal_backward_kernel<bf16, 2, 3, (Fused)0>", 1024 * 16 // 4, 7),
        ("mochi-1-480p", {}, "fwd", "temporal_forward_kernel<bf16, 4, 4, (Fused)0>", 1590 * 24 * 2 // 4, 4),
        ("mochi-1-480p", {}, "bwd", "temporal_backward_kernel<bf16, 4, 4, (Fused)0>", 1590 * 24 // 2, 7),
        (
            "mochi-1-480p",
            {"norm_rope": True},
            "fwd",
            "temporal_forward_kernel<bf16, 4, 4, (Fused)1>",
            1590 * 24 // 2,
            4,
        ),
    ],
)
def test_temporal_attention(workload, given, mode, kernel, blocks, tensors):
    wanted = job("temporal_attention", workload, **given)
    (launch,) = rows.phases_of(wanted, "sm_90")[mode]
    assert (rows.short_name(launch.kernel), launch.blocks, launch.threads) == (kernel, blocks, 128)
    s = wanted.shape
    of_a_tensor = 2 * s.B * s.T * s.S * s.H * s.D
    assert 0 <= launch.bytes - tensors * of_a_tensor < of_a_tensor / 20  # lse, weights and tables are small


def test_frame_attention_has_a_block_for_each_multiprocessor_and_runs_on_hopper_alone():
    wanted = job("video_attention", "wan2.2-5b-704p")
    found = rows.phases_of(wanted, "sm_90")
    (launch,) = found["fwd"]
    assert launch.blocks == 132 and launch.threads == 3 * 128 and launch.cluster == 2 and not found["bwd"]
    assert rows.short_name(launch.kernel).startswith("frame_attention_sm90_fwd_kernel<FramePlan<128, 2, ")
    assert rows.phases_of(wanted, "sm_80") == {} == rows.phases_of(wanted, "sm_120")


def test_gated_attention_is_two_kernels():
    launches = rows.phases_of(job("gated_attention", "latte-1-512"), "sm_90")["fwd"]
    names = [rows.short_name(one.kernel) for one in launches]
    assert [name.partition("<")[0] for name in names] == ["temporal_forward_kernel", "frame_attention_sm90_fwd_kernel"]


def test_norm_and_rope_alone():
    wanted = job("qk_norm_rope", "hunyuanvideo-720p", norm_rope=True)
    found = rows.phases_of(wanted, "sm_80")
    s = wanted.shape
    heads = s.T * s.S * s.H
    assert [one.blocks for one in found["fwd"]] == [-(-heads // 32)] * 2
    assert {rows.short_name(one.kernel).partition("<")[0] for one in found["bwd"]} == {"rows_norm_rope_backward_kernel"}


def test_shared_memory_of_the_chip_decides_what_fits():
    """A long backward: 97 KiB of a block on sm_89, 227 on sm_90."""
    q = torch.empty(1, 240, 4, 2, 128, dtype=torch.bfloat16, requires_grad=True)
    call = rows.capture(vdcore.temporal_attention, q, q, q)
    why_not = rows.BACKENDS["cuda"].operators["temporal_attention"].why_not_backward
    for arch, fits in (("sm_89", False), ("sm_90", True)):
        with cuda.recording((8, 9), multiprocessors=132, shared=rows.chip_of(arch).most):
            assert (why_not(call) is None) == fits


def test_nothing_runs_while_it_records_and_everything_after():
    q = torch.randn(1, 4, 3, 2, 16, dtype=torch.bfloat16)
    right = vdcore.temporal_attention(q, q, q, backend="cuda")
    with cuda.recording((9, 0), multiprocessors=132, shared=232_448) as launches:
        vdcore.temporal_attention(q, q, q, backend="cuda")
        assert not launches
    assert len(launches) == 1 and torch.equal(vdcore.temporal_attention(q, q, q, backend="cuda"), right)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void vdcore::cuda::f<vdcore::cuda::bf16, 2, true>(vdcore::cuda::A)", "f<bf16, 2, true>"),
        ("void vdcore::cuda::(anonymous namespace)::g<(vdcore::cuda::(anonymous namespace)::P)1>(A)", "g<(P)1>"),
        ("void vdcore::cuda::_GLOBAL__N__1b_x_cu_2::g<(vdcore::cuda::_GLOBAL__N__1b_x_cu_2::P)1>(A)", "g<(P)1>"),
        ("void vdcore::cuda::f<vdcore::cuda::Plan<64, 3>, vdcore::cuda::f16>(A)", "f<Plan<64, 3>, f16>"),
    ],
)
def test_a_kernel_has_one_short_name_for_both_compilers(kernel, name):
    assert rows.short_name(kernel) == name


@pytest.mark.parametrize(
    ("built", "arch", "fits"),
    [
        ("sm_80", "sm_89", True),
        ("sm_90", "sm_89", False),
        ("sm_90a", "sm_90", True),
        ("sm_90a", "sm_100", False),
        ("sm_90", "sm_100", False),
        ("sm_100", "sm_103", True),
    ],
)
def test_which_code_hardware_takes(built, arch, fits):
    assert rows._fits(built, arch) == fits
