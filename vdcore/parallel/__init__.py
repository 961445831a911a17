"""One video on several processes: context parallelism on ``torch.distributed``.

Tokens ``(B, T, S, ...)`` are split along frames or along tokens over a one-dimensional ``DeviceMesh``. Every rank
computes the loss of its own part; the loss is the sum. Gradients of inputs are those of that sum; those of a model's
parameters are N times the rank's share, so that the mean over the mesh, which DDP and FSDP2 take and
:func:`average_gradients`, is the gradient of one process.
"""

from vdcore.parallel.attention import video_attention
from vdcore.parallel.gradients import average_gradients
from vdcore.parallel.messages import ExchangeError
from vdcore.parallel.peers import part_sizes
from vdcore.parallel.plan import Plan, explain
from vdcore.parallel.switch import gather, shard, start_switch, switch
from vdcore.parallel.traffic import Allocations, Traffic

__all__ = [
    "Allocations",
    "ExchangeError",
    "Plan",
    "Traffic",
    "average_gradients",
    "explain",
    "gather",
    "part_sizes",
    "shard",
    "start_switch",
    "switch",
    "video_attention",
]
