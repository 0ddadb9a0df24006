"""everseg keeps a semantic-segmentation model learning: new classes, new domains, without the old data.

Public names are imported when first used, so that `import everseg` stays fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "demo": "everseg.api:demo",
    "run": "everseg.api:run",
    "show": "everseg.reports.outline:show",
    "load": "everseg.api:load",
    "evaluate": "everseg.engine.rescore:evaluate",
    "predict": "everseg.inference.predict:predict",
    "report": "everseg.api:report",
    "features": "everseg.api:features",
    "sweep": "everseg.sweeps.sweep:sweep",
    "compare": "everseg.reports.compare.comparison:compare",
    "export": "everseg.deploy.export:export",
    "extend": "everseg.deploy.extend:extend",
    "preview": "everseg.deploy.extend:preview",
    "history": "everseg.deploy.history:history",
    "rollback": "everseg.deploy.history:rollback",
    "diff": "everseg.deploy.diff:diff",
    "bench": "everseg.deploy.bench:bench",
    "adopt": "everseg.deploy.adopt:adopt",
    "page": "everseg.deploy.browser:page",
    "push": "everseg.deploy.hub:push",
    "pull": "everseg.deploy.hub:pull",
    "serve": "everseg.deploy.serve:serve",
    "sign": "everseg.deploy.sign:sign",
    "verify": "everseg.deploy.sign:verify",
    "env": "everseg.reports.installation:env",
    "data": "everseg.data",
    "Run": "everseg.api:Run",
    "Method": "everseg.methods.base:Method",
    "LabelSpace": "everseg.labels:LabelSpace",
    "LabelPolicy": "everseg.labels:LabelPolicy",
    "losses": "everseg.losses",
    "metrics": "everseg.metrics",
    "scenarios": "everseg.scenarios",
    "interop": "everseg.interop",
}
__all__ = ["__version__", *_LAZY]


def lazy_attribute(module: str, addresses: Mapping[str, str], name: str) -> Any:
    """What `__getattr__` of a module gives whose names are imported when first used.

    Args:
        addresses: name -> "package.module" or "package.module:Attr".

    Raises:
        AttributeError: no such name.
    """
    if name not in addresses:
        raise AttributeError(f"module '{module}' has no attribute '{name}'")
    home, _, attribute = addresses[name].partition(":")
    value = importlib.import_module(home)
    return getattr(value, attribute) if attribute else value


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, _LAZY, name)


def __dir__() -> list[str]:
    return sorted(__all__)
