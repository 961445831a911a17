"""Attention of boxes of tokens, windows in frames, rows and columns and listed tiles: one engine."""
