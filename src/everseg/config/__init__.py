"""The typed configuration of a run, and the presets it is made of."""
