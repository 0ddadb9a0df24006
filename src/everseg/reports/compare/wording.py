"""Numbers of a comparison as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everseg.display import UNDEFINED, count, in_percent, size, spread
from everseg.progress import time_text
from everseg.reports.compare.columns import column


def text(number: str, found: Mapping[str, Any] | None, *, signed: bool = False, sign: str = "±") -> str:
    """Format mean and standard deviation in the number's unit; a dash if unknown. Equal counts have no deviation.

    Args:
        signed: it is a difference.
    """
    if found is None or found["mean"] is None:
        return UNDEFINED
    mean, sd = found["mean"], found["sd"]
    unit = column(number).unit
    if unit == "time" and not signed:
        return time_text(mean) + ("" if sd is None else f" {sign} {time_text(sd)}")
    if unit in ("time", "seconds"):
        return f"{spread(mean, sd, sign=sign, signed=signed)} s"
    if unit in ("bytes", "count"):
        return (size if unit == "bytes" else count)(mean, sd or None, sign=sign)
    signed = signed or unit == "signed percent"
    return spread(in_percent(mean), in_percent(sd), sign=sign, signed=signed)
