"""lineage.json and state.json: whatever stands in them is told, or harmless to what reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everseg.deploy.bundle import Bundle, open_bundle
from everseg.deploy.history import History, _ancestors
from everseg.deploy.serve import Served
from everseg.engine.optim import load_optimizer_state, optimizer_state
from everseg.errors import CheckpointError
from everseg.runs.documents import LINEAGE, STATE
from everseg.runs.shapes import problems_of
from hostile_documents import variants

BUNDLES = sorted(Path(__file__).parent.parent.glob("fixtures/**/lineage.json"))


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.parent.name)
def test_a_lineage_is_told_or_harmless(path: Path) -> None:
    honest = json.loads(path.read_text())
    assert problems_of(honest, LINEAGE) == []
    bundle = open_bundle(path.parent)
    told = harmless = 0
    for case, value in variants(honest):
        if problems_of(value, LINEAGE):
            told += 1
            continue
        use(bundle, value, case)
        harmless += 1
    assert told > 10 * len(honest["history"])
    assert harmless


def use(bundle: Bundle, lineage: Mapping[str, Any], case: str) -> None:
    changed = Bundle(bundle.path, bundle.digest, bundle.about, lineage)
    try:
        list(changed.shown())
        list(
            History(
                changed.path, changed.digest, tuple(lineage["history"]), tuple(_ancestors(changed, {}))
            ).shown()
        )
        assert changed.steps >= 0
        model = SimpleNamespace(model=torch.nn.Linear(1, 1), onnx=None)
        assert Served.about(SimpleNamespace(bundle=changed, model=model))
    except Exception as error:
        raise AssertionError(f"{case}: {error!r}") from error


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_state_of_an_optimiser_is_told_or_harmless(kind: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(2, 2)

    def fresh() -> torch.optim.Optimizer:
        return kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    optimiser = fresh()
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    tensors, document = optimizer_state(optimiser, model)
    honest = json.loads(
        json.dumps({"iteration": 1, "total": 2, "processes": 1, "scaler": None, "optimizer": document})
    )
    assert problems_of(honest, STATE) == []
    load_optimizer_state(fresh(), model, tensors, honest["optimizer"])
    outcomes = set()
    for case, value in variants(honest):
        if problems_of(value, STATE) or "optimizer" not in value:
            outcomes.add("told by its shape")
            continue
        again = fresh()
        try:
            load_optimizer_state(again, model, tensors, value["optimizer"])
        except CheckpointError:
            outcomes.add("told by what it does not fit")
            continue
        try:
            again.step()
        except Exception as error:
            raise AssertionError(f"{case}: {error!r}") from error
        outcomes.add("harmless")
    assert len(outcomes) == 3
