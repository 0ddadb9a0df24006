"""Kinds of heads that a description may name."""

from __future__ import annotations

from everseg.models.heads import GrowingHead
from everseg.models.region_head import RegionHead
from everseg.types import REGIONS

KINDS: dict[str, type[GrowingHead]] = {REGIONS: RegionHead}
"""Value of `Head.kind` -> class; it is called as `GrowingHead` is. Other kinds are refused."""
