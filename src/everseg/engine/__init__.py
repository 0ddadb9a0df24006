"""The engine: one loop over steps and batches, checkpoints, evaluation, journal."""
