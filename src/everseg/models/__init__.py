"""Networks that grow: encoders, decoders, classifiers per branch, and their initial weights."""
