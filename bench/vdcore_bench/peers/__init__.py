"""The baselines, each at its best setting, a file per baseline.

A peer takes the public function's own arguments and returns its result in the same layout, permutes and copies
included. Where one library can be called in several ways, every way is a variant, and the fastest one counts.
"""

from importlib import import_module

from vdcore_bench.peers.registry import ATTENTION, PEERS, Peer, from_user, names, peer

# The strongest first: where the clock cuts a job's peers, the last are missing.
FILES = [
    "sdpa",
    "naive",
    "flex",
    "flash_attn",
    "xformers",
    "natten",
    "fastvideo",
    "sageattention",
    "eager",
    "linear",
    "conv3d",
]
for _file in FILES:
    import_module(f"{__name__}.{_file}")

__all__ = ["ATTENTION", "PEERS", "Peer", "from_user", "names", "peer"]
