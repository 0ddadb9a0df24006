"""Sweeps over methods, seeds and tasks: which runs, and where they are trained."""
