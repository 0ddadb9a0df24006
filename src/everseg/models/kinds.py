"""Kinds of heads that a description may name."""

from __future__ import annotations

from everseg.models.heads import GrowingHead

KINDS: dict[str, type[GrowingHead]] = {}
"""Value of `Head.kind` -> class; it is called as `GrowingHead` is. Other kinds are refused."""
