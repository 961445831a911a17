"""Spatial and video attention: all tokens of the visible frames."""
