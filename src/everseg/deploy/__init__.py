"""Finished models as bundles that are complete by themselves, and what is done with them."""
