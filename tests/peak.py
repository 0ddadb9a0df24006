"""The most memory that this process has had since a moment, as Linux tells it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def new_peak(*, trim: bool = True) -> int:
    """Forget the largest moment so far; the bytes of memory that the process has now.

    Args:
        trim: give back to the system what is free, which would otherwise hide as much of what comes.
    """
    if trim:
        gc.collect()
        with contextlib.suppress(AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    return _line("VmRSS")


def peak() -> int:
    """Most bytes of memory since `new_peak`."""
    return _line("VmHWM")


def _line(name: str) -> int:
    return int(STATUS.read_text().split(f"{name}:")[1].split()[0]) << 10
