"""Gated attention: what it adds to temporal and frame attention."""
