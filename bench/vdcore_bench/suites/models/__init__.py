"""Whole models and blocks of them."""
