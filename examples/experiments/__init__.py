"""Experiments that show what this engine is for, one figure a claim."""
