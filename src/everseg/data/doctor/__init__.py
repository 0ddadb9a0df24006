"""Check every file of a data set before training, and report its faults."""
