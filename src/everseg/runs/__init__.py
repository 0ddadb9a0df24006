"""Runs and models on disk: verified folders, journals, and the scores stored in them."""
