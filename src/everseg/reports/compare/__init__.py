"""Runs side by side: which may stand together, their statistics, their tables."""
