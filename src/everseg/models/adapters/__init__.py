"""Encoders and whole networks of other libraries."""
