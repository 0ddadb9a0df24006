"""From a configuration with domains to opened data and steps, and what does not fit together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from everseg.config.loading import load
from everseg.config.yaml import parse
from everseg.engine.prepare import prepare
from everseg.errors import ConfigError
from everseg.progress import Progress
from everseg.scenarios.summary import summarise

FEW = {"num_train": 6, "num_val": 3, "size": [32, 48]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "cache"))


def config(kind: str = "domain-incremental", **scenario: Any) -> Any:
    domains = {
        "day": {"dataset": "demo", "options": FEW},
        "dusk": {"dataset": "demo", "options": {**FEW, "light": "dusk"}, "rename": {"car": "vehicle"}},
    }
    return load({"data": {"domains": domains}, "scenario": {"kind": kind, **scenario}})


def prepared(settings: Any) -> Any:
    return prepare(settings.data, settings.scenario, Progress(quiet=True), seed=settings.seed)


def test_domains_become_data_sets_counts_and_steps_under_their_names() -> None:
    ready = prepared(config())
    assert list(ready.datasets) == ["day", "dusk"]
    assert sorted(ready.counts) == ["day/train", "day/val", "dusk/train", "dusk/val"]
    assert [step.branch for step in ready.steps] == ["day", "dusk"]
    assert ready.steps[1].spaces["dusk"].names[4] == "vehicle"
    for step in ready.steps:
        for source in (*step.train, *step.test):
            assert len(source.indices) == len(ready.datasets[source.dataset].splits[source.split])


def test_the_data_of_a_domain_that_no_step_names_are_not_needed() -> None:
    settings = config(steps=[{"domain": "day"}])
    missing = settings.data.domains["dusk"].model_copy(update={"dataset": "cityscapes", "root": "nowhere"})
    domains = {"night": missing, **settings.data.domains, "dusk": missing}
    data = settings.data.model_copy(update={"domains": domains})
    ready = prepared(settings.model_copy(update={"data": data}))
    assert list(ready.datasets) == ["day"]
    assert sorted(ready.counts) == ["day/train", "day/val"]
    assert ready.steps == prepared(settings).steps
    with pytest.raises(ConfigError, match=r"steps\[0\]\.domain.*'dask'.*\(day, dusk\).*'dusk'"):
        prepared(config(steps=[{"domain": "dask"}, {"domain": "day"}]))


def test_domains_keep_their_order_whatever_the_order_of_the_steps() -> None:
    ready = prepared(config(steps=[{"domain": "dusk"}, {"domain": "day"}]))
    assert list(ready.datasets) == ["day", "dusk"]
    assert [step.branch for step in ready.steps] == ["dusk", "day"]


def test_what_every_domain_will_see_is_told_before_training() -> None:
    ready = prepared(config(class_weights="computed"))
    first, second = summarise(ready.steps, ready.counts)
    assert (first["domains"], second["domains"]) == (["day"], ["dusk"])
    assert "vehicle" in second["classes"]
    assert second["class_weights"]["vehicle"] > second["class_weights"]["road"]


def test_kind_and_domains_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"scenario.kind: 'domain-incremental' needs data.domains"):
        prepared(load({"scenario": {"kind": "domain-incremental"}}))
    with pytest.raises(ConfigError, match=r"one data set.*data\.domains.*day, dusk"):
        prepared(config(kind="class-incremental"))


def test_a_split_that_a_domain_lacks_is_told_with_the_domain() -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(config(test_split="test"))
    assert len(caught.value.problems) == 2
    assert "'dusk'" in caught.value.problems[1]
    assert "'test'" in caught.value.problems[1]
    assert "train, val" in caught.value.problems[1]


def test_the_examples_of_the_documentation_are_scenarios() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "scenarios.md"
    found = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    steps = []
    for code in found:
        few = [
            f"data.domains.{name}.options.{key}=4"
            for name in ("day", "dusk")
            for key in ("num_train", "num_val")
        ]
        steps.append(prepared(load(parse(code, "docs/scenarios.md").value, few)).steps)
    alone, shared, mixed = steps
    assert [dict(step.grows) for step in alone] == [{"day": 7}, {"dusk": 7}]
    assert [dict(step.grows) for step in shared] == [{"street": 7}, {"street": 1}]
    assert shared[1].spaces["street"].names[-1] == "vehicle"
    assert [dict(step.grows) for step in mixed] == [{"day": 5}, {"dusk": 7}, {"day": 2}]
