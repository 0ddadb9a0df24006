"""The model card's table of classes."""

from __future__ import annotations

from typing import Any

import pytest

from everseg.deploy.card import _classes, _origin
from everseg.runs.model_folder import BundleClass, Registry


def history(*steps: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [{"scores": {domain: {"class_iou": ious} for domain, ious in step.items()}} for step in steps]


def ious(*steps: dict[str, dict[str, float]]) -> dict[str, str]:
    names = ["road", "autorickshaw", "never tested"]
    known = Registry(tuple(BundleClass(i, n, (0, 0, 0), 0, ("a",)) for i, n in enumerate(names)), len(names))
    rows = [row.split(" | ") for row in list(_classes(known, history(*steps)))[2:]]
    return {row[1]: row[3] for row in rows}


def test_a_class_that_only_a_later_domain_knows() -> None:
    """Cityscapes has no autorickshaw."""
    first = {"cs": {"road": 0.5}}
    second = {"cs": {"road": 0.4}, "idd": {"road": 0.3, "autorickshaw": 0.2}}
    assert ious(first, second) == {
        "road": "cs 40.0, idd 30.0",
        "autorickshaw": "idd 20.0",
        "never tested": "-",
    }


def test_only_the_last_test_of_a_class_counts() -> None:
    first = {"cs": {"road": 0.5, "autorickshaw": 0.1}, "idd": {"autorickshaw": 0.2}}
    assert ious(first, {"cs": {"road": 0.4}}) == {
        "road": "40.0",
        "autorickshaw": "cs 10.0, idd 20.0",
        "never tested": "-",
    }


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("everseg run x.yaml", "Command: `everseg run x.yaml`"),
        (None, "Started from Python, not by a command"),
    ],
)
def test_what_started_the_run_is_told_as_it_was(command: str | None, told: str) -> None:
    run = {"command": command, "seed": 1, "config_hash": 64 * "a"}
    lines = list(_origin({"run": run, "parent": None, "history": [], "parity": {}, "versions": {}}))
    assert lines[0] == f"* {told} (seed 1, configuration aaaaaaaaaaaa…)"
