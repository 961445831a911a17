"""Norm and rotary embedding of queries and keys."""
