"""Adaptive layer norm: modulate and gate_residual."""
