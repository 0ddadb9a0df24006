"""Checks and timings that are no part of the package."""
