"""Opening the data sets of several domains: every problem at once, each with its domain."""

from __future__ import annotations

from pathlib import Path

import pytest

from everseg.config.fields import DataConfig
from everseg.data.datasets import load_domains
from everseg.errors import ConfigError, DataError

BUILDER = """\
from everseg.data.base import Dataset
from everseg.labels import RawLabels

def build(root, *, one):
    return Dataset("streets", RawLabels({0: "road", 1: one}, background=None), {})
"""


def demo(**settings: object) -> dict[str, object]:
    return {"dataset": "demo", "options": {"num_train": 2, "num_val": 2}, **settings}


def test_every_domain_is_opened_under_its_name_in_the_given_order_with_its_names() -> None:
    data = DataConfig(
        domains={
            "dusk": demo(options={"light": "dusk", "num_train": 3}, rename={"car": "vehicle", "sign": "ignore"}),
            "day": demo(),
        }
    )  # fmt: skip
    opened = load_domains(data)
    assert list(opened) == ["dusk", "day"]
    assert len(opened["dusk"].splits["train"]) == 3
    assert opened["dusk"].labels.names[4] == "vehicle"
    assert 6 not in opened["dusk"].labels.names
    assert opened["day"].labels.names[4] == "car"


def test_a_domain_without_root_takes_that_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_domains(
            DataConfig(
                root=str(tmp_path / ".."),
                domains={"a": {"dataset": "camvid", "root": str(tmp_path)}, "b": {"dataset": "camvid"}},
            )
        )
    first, second = str(caught.value).splitlines()[1:]
    assert first.strip().startswith(f"data.domains.a: {tmp_path}:")
    assert second.strip().startswith(f"data.domains.b: {tmp_path.parent}:")


def test_all_problems_of_all_domains_are_told_with_their_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        load_domains(
            DataConfig(
                domains={
                    "a": {"dataset": "camvidd"},
                    "b": {"dataset": "camvid"},
                    "c": demo(options={"lihgt": "dusk"}),
                    "d": demo(rename={"cra": "vehicle"}),
                }
            )
        )
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == [
        "data.domains.a.dataset",
        "data.domains.b.root",
        "data.domains.c.options.lihgt",
        "data.domains.d.rename.cra",
    ]
    assert all("did you mean" in problems[i] for i in (0, 2, 3))


def test_one_name_for_data_sets_whose_ids_mean_different_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "streets.py").write_text(BUILDER)

    def domain(one: str, **more: object) -> dict[str, object]:
        return {"dataset": f"{tmp_path / 'streets.py'}:build", "options": {"one": one}, **more}

    with pytest.raises(ConfigError) as caught:
        load_domains(DataConfig(domains={"a": domain("sky"), "b": domain("car"), "c": domain("sky")}))
    first, second = caught.value.problems
    assert first.startswith("data.domains.b: data set 'streets' has other classes than in domain 'a'")
    assert "id 1 is 'car' here and 'sky' there" in first
    assert "in domain 'b'" in second
    assert load_domains(DataConfig(domains={"a": domain("sky"), "b": domain("sky", rename={"sky": "up"})}))
