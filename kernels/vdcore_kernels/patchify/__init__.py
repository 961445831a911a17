"""Patch embedding and its inverse."""
