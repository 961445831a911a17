"""What the suite gpu runs, and in which order: smoke first, then what everything else is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vdcore_bench.suites.operators import TRAINING, Item

ROOT = Path(__file__).resolve().parents[4]  # of the checkout, whose tests are run
BF16 = ("bfloat16",)
NUMERICS = "test_numerics.py"  # which the part `correctness` has


@dataclass(frozen=True)
class Part:
    """A part of the suite, in processes of its own.

    Args:
        seconds: that it may take; each part fits into a run of nine minutes.
        shards: processes side by side.
        patience: seconds without a step's end after which its process is given up.
    """

    what: str
    seconds: float
    shards: int = 1
    patience: float = 90.0


SHARDS = 8  # of correctness: what takes time there is compiling
# In the order of a run.
PARTS = {
    "selfcheck": Part("what the other parts import and run is there; needs no GPU", 60),
    "build": Part("the compiled modules, CUDA's among them where nvcc is", 510, patience=510),
    "compile": Part("Triton's kernels of the benchmarks, in parallel, into its cache", 300, patience=300),
    "smoke": Part("one call of every operator and backend, judged", 150),
    "ceilings": Part("copy bandwidth and bfloat16 product of the card", 60),
    "benchmarks": Part("vdcore beside the strongest of its peers", 510),
    "correctness": Part("every case, by the tolerance rule", 480, SHARDS),
    "contract": Part("the tests that need a GPU", 480, patience=480),
    "slow": Part("all other peers, those that compile among them", 510, patience=180),
    "frames": Part("naive N^2 attention and vdcore over frames: time and memory", 120),
    "sweep": Part("rows of the kernels' config tables against one another", 510),
}
# Attention's strongest: of these alone the part `benchmarks` runs; all that is compiled or slow comes last.
STRONGEST = frozenset({"vdcore", "copy", "sdpa[flash]", "sdpa[cudnn]"})
# Where torch.compile has something to fuse, its result is a strong peer.
FUSED = frozenset({"modulate", "gate_residual", "qk_norm_rope", "patchify", "unpatchify"})

# The claims to be measured, most telling first: the time of a part may end before the list does.
ITEMS = (
    Item("temporal_attention", "latte-1-512", TRAINING, BF16),
    Item("temporal_attention", "mochi-1-480p", TRAINING, BF16),
    Item("video_attention", "wan2.2-5b-704p", TRAINING, BF16),
    Item("spatial_attention", "stdit3-720p-102f", TRAINING, BF16),
    Item("gated_attention", "latte-1-512", TRAINING, BF16),
    Item("patchify", "wan2.2-5b-704p", TRAINING, BF16),
    Item("modulate", "wan2.2-5b-704p", TRAINING, BF16),
    Item("qk_norm_rope", "wan2.2-5b-704p", TRAINING, BF16),
    Item("temporal_attention", "stdit3-720p-102f", TRAINING, BF16),
    Item("temporal_attention", "svd-xt-level1", TRAINING, BF16),
    Item("temporal_attention", "animatediff-level1", TRAINING, BF16),
    Item("temporal_attention", "latte-1-512", TRAINING, BF16, norm_rope=True),
    Item("temporal_attention", "mochi-1-480p", TRAINING, BF16, norm_rope=True),
    Item("video_attention", "hunyuanvideo-720p", ("fwd",), BF16),
    Item("video_attention", "long-video-60f", TRAINING, BF16),
    Item("video_attention", "long-video-240f", ("fwd",), BF16),
    Item("video_attention", "self-forcing-1.3b", ("fwd",), BF16),
    Item("cross_attention", "wan2.2-5b-704p", TRAINING, BF16),
    Item("gate_residual", "wan2.2-5b-704p", TRAINING, BF16),
    Item("unpatchify", "wan2.2-5b-704p", TRAINING, BF16),
)
FRAMES = (8, 16, 32, 64, 128, 256)


def items(dry: bool = False) -> tuple[Item, ...]:
    """Of a dry run one per operator: what a shape changes is compiled for seconds, and computes nothing."""
    return tuple({item.op: item for item in reversed(ITEMS)}.values())[::-1] if dry else ITEMS


def tests() -> list[Path]:
    """Files of the part `contract`."""
    found = [path for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")) if path.name != NUMERICS]
    return found + [ROOT / "tests" / "ops" / f"test_{name}.py" for name in ("cuda", "cuda_frame_attention")]
