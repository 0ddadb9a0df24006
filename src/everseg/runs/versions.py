"""Versions of everseg and of what it computes with, as runs and bundles record them."""

from __future__ import annotations

from importlib.metadata import version

import everseg


def versions(*packages: str) -> dict[str, str]:
    """Package -> version.

    everseg's own is that of the code that runs. A checkout on the path need not be installed, and another everseg may
    be installed beside it.
    """
    return {name: everseg.__version__ if name == "everseg" else version(name) for name in packages}
