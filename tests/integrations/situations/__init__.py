"""What people do with a model of diffusers besides calling it: a room for every kind of it."""

from situations import adapters, blocks, caches, compilers, gradients, hooks, modes, processes, weights
from situations.entry import SITUATIONS
from situations.hooks import blocks_with_attention, derived
from situations.modes import sized

ROOMS = (adapters, blocks, caches, compilers, gradients, hooks, modes, processes, weights)  # each enters its own

__all__ = ["ROOMS", "SITUATIONS", "blocks_with_attention", "derived", "sized"]
