"""The shipped presets made small: the one place that says how the runs of the pages differ from what is printed.

Everything a command line or a file says stays as it is; only what comes from a preset is cut down. Run as a script it
is the command line with these presets, for processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DEMO = {"num_train": 16, "num_val": 4, "size": [32, 48]}
NARROW = {"stem": 4, "widths": [4, 4, 4, 4], "hidden": 4, "out_channels": 4}
MODELS = {
    "deeplabv3-resnet101": {**NARROW, "blocks": [1, 1, 1, 1], "pool_size": None},
    "deeplabv3-tiny": {**NARROW, "stem_pool": False, "rates": [1, 2, 3]},
    "erfnet": {"widths": [6, 8, 10], "blocks": [1, 1]},
}
SMALL = {
    "tracker": [],
    "report": False,
    "data": {"crop": 32, "size": [32, 48], "workers": 0},
    "train": {"epochs": 1, "epochs_next": 1, "batch": 2, "lr_next": 1e-4, "threads": 1},
}


def small(preset: dict[str, Any]) -> dict[str, Any]:
    """One pass over few small images through a narrow network; no report and no events unless a command makes them."""
    result = {**preset, **{key: SMALL[key] for key in ("tracker", "report")}}
    for section in ("data", "train"):
        result[section] = {**preset[section], **SMALL[section]}
    data, model = result["data"], preset["model"]
    if data.get("dataset") == "demo":
        data["options"] = DEMO
    if "domains" in data:
        data["domains"] = {
            name: {**one, "options": {**one.get("options", {}), **DEMO}} if one["dataset"] == "demo" else one
            for name, one in data["domains"].items()
        }
    options = {**model.get("options", {}), **MODELS.get(model["name"], {})}
    return {**result, "model": {**model, "options": options}}


def loading(load: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """`presets.load_preset` that gives small presets."""
    return lambda name: small(load(name))


def main() -> None:
    from everseg.cli import main as cli
    from everseg.config import presets

    presets.load_preset = loading(presets.load_preset)
    cli.main()


if __name__ == "__main__":
    main()
