"""Checks of the arguments that all readers share (floor 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everseg.data.datasets.decode import Reading
from everseg.errors import ConfigError


def root_of(root: str | Path | None) -> Path:
    """Check a reader's root and resolve it.

    Raises:
        ConfigError: not given, or no such folder.
    """
    if root is None:
        raise ConfigError("data.root: this data set needs its folder; pass data.root=DIR")
    path = Path(root).expanduser()
    if not path.exists():
        raise ConfigError(f"data.root: {root} does not exist; pass data.root=DIR")
    if not path.is_dir():
        raise ConfigError(f"data.root: {root} is a file; pass the folder it was unpacked to as data.root=DIR")
    return path.resolve()


def reading_of(max_pixels: Any, follow_links: Any, exif: Any) -> Reading:
    """Check the decoder's options.

    Raises:
        ConfigError: all that are wrong.
    """
    problems = []
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        problems.append(f"data.options.max_pixels: expected a positive whole number, got {max_pixels!r}")
    if not isinstance(follow_links, bool):
        problems.append(f"data.options.follow_links: expected true or false, got {follow_links!r}")
    if exif not in ("apply", "ignore"):
        problems.append(f"data.options.exif: expected 'apply' or 'ignore', got {exif!r}")
    if problems:
        raise ConfigError(problems)
    return Reading(max_pixels, follow_links, exif)
