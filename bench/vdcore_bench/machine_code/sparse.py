"""Windows and listed tiles among the jobs, and how many tiles of pairs a launch multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from vdcore import FrameMask, GridMask, TileLists
from vdcore.ops.tile_attention.boxes import tiles_of
from vdcore_bench.jobs import VideoJob, make
from vdcore_bench.jobs.base import Job, Tensors
from vdcore_bench.machine_code.code import Row
from vdcore_bench.workloads import load
from vdcore_kernels.core.launch import Launch, cdiv
from vdcore_kernels.tile_attention import plan

WORKLOADS = ("ltx-2b-704p", "wan2.2-5b-704p")  # 64 and 128 channels, on the models' own grids
TILE = (4, 8, 8)  # divides none of them


def masks(rows: int, columns: int) -> dict[str, GridMask]:
    """A window of tokens, one of tiles, and one that narrows with the distance of frames; by variant."""
    return {
        "tokens": GridMask.neighborhood((7, 11, 19)),
        "tiles": GridMask.tiles((3, 3, 3), TILE),
        "radial": GridMask.radial(rows, columns),
    }


class ListsJob(VideoJob):
    """Every tile lists a quarter of all: those that follow it."""

    @property
    def tiles(self) -> int:
        s = self.shape
        return tiles_of(s.T, (s.rows, s.columns), TILE)

    @property
    def density(self) -> float:
        return self.tiles // 4 / self.tiles

    def arguments(self, t: Tensors) -> dict[str, Any]:
        q, k, v = self.qkv(t)
        n, s, H = self.tiles, self.shape, self.shape.H
        listed = (torch.arange(n, device=q.device)[:, None] + torch.arange(n // 4, device=q.device)) % n
        indices = listed.sort(1).values.to(torch.int32).expand(1, H, n, -1).contiguous()
        counts = torch.full((1, H, n), n // 4, dtype=torch.int32, device=q.device)
        grid = {"tile": TILE, "grid": (s.rows, s.columns)}
        return {"q": q, "k": k, "v": v, "tiles": TileLists(indices, counts), **grid}


def jobs(options: dict[str, Any]) -> Iterator[Job]:
    """Windows and lists, and what they are compared with: dense attention, where the benchmarks have it not."""
    yield make("video_attention", load()[WORKLOADS[0]], **options)
    for name in WORKLOADS:
        workload = load()[name]
        for mask in masks(*workload.grid).values():
            yield make("video_attention", workload, mask=FrameMask(), grid_mask=mask, **options)
        yield ListsJob("tile_attention", workload, workload.shape(), workload.shape(), **options)


def variant_of(job: Job) -> str | None:
    """tokens, tiles, radial or lists; None: it has neither windows nor lists."""
    if isinstance(job, ListsJob):
        return "lists"
    if job.grid_mask is None:
        return None
    if job.grid_mask.tile != (1, 1, 1):
        return "tiles"
    return "radial" if isinstance(job.grid_mask.rows, tuple) else "tokens"


class Walk(NamedTuple):
    """Of all programs of a launch.

    Args:
        whole, tested: tiles of pairs that are multiplied: those that all queries see, and those that are tested or cut
            off.
        flops: of one of them.
    """

    whole: int
    tested: int
    flops: int


def walk_of(job: Job, launch: Launch) -> Walk | None:
    """None: the kernel multiplies no tiles, or the job is none that is compared by pairs."""
    kernel, s = launch.kernel.__name__, job.shape
    dense = job.op == "video_attention" and job.mask == FrameMask.full() and not getattr(job, "text", False)
    if not kernel.startswith(("frame_attention", "tile_attention")) or not (variant_of(job) or dense):
        return None
    tile, of_keys = launch.arguments["TILE"], kernel.endswith("kv_kernel")
    held, walked = (tile.BN, tile.BM) if of_keys else (tile.BM, tile.BN)
    products = 4 if of_keys else 3 if kernel.endswith("bwd_q_kernel") else 2
    flops = 2 * products * tile.BM * tile.BN * (tile.ROW.W0 + tile.ROW.W1)
    of_a_head = _of_a_head(job, held=held, walked=walked, of_keys=of_keys)
    whole, tested = (s.B * s.H * n for n in of_a_head)
    return Walk(whole, tested, flops)


def _of_a_head(job: Job, *, held: int, walked: int, of_keys: bool) -> tuple[int, int]:
    s = job.shape
    sizes: dict[str, Any] = {"held": held, "walked": walked, "device": torch.device("cpu")}
    if isinstance(job, ListsJob):
        parts = plan.tiles(s.T, (s.rows, s.columns), TILE, **sizes).parts
        return job.tiles * (job.tiles // 4) * parts[0] * parts[1], 0
    if job.grid_mask is not None:
        boxes = plan.windows(job.grid_mask, (s.rows, s.columns), s.T, s.T, 0, of_keys=of_keys, **sizes)
        begin, tested, end = boxes.held[:, 3:6].long().sum(0).tolist()
        return tested - begin, end - tested
    tiles, tokens = cdiv(s.T * s.S, held), s.T * s.S
    return tiles * (tokens // walked), tiles * (tokens % walked > 0)


KERNELS = {"fwd_kernel": "forward", "bwd_q_kernel": "queries' gradient", "bwd_kv_kernel": "keys' and values'"}
WHAT = {
    "tokens": "neighborhood of 7 x 11 x 19",
    "tiles": "3 x 3 x 3 tiles of 4 x 8 x 8",
    "radial": "radial",
    "lists": "lists of a quarter of the tiles of 4 x 8 x 8",
}


def over_dense(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table: the time of a visible pair over dense attention's, by workload."""
    times = {
        (r["workload"], r["variant"], r["kernel"].partition("_attention_")[2]): r["pair_ps"]
        for r in rows
        if "pairs" in r
    }
    header = [f"{name.partition('-')[0]}: {what}" for name in WORKLOADS for what in KERNELS.values()]
    lines = [f"| visible | {' | '.join(header)} |", "| --- |" + " ---: |" * len(header)]
    for variant, what in WHAT.items():
        cells = [
            f"{times[name, variant, kernel] / times[name, 'plain', kernel]:.1f}"
            for name in WORKLOADS
            for kernel in KERNELS
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines
