"""Triton kernels, a room per operator; ``core`` is what they share. The public door is ``vdcore``."""
