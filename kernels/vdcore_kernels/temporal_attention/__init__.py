"""Temporal attention: a position's tokens over frames."""
