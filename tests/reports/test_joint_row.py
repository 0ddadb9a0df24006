"""The joint row of the step matrix: there for exactly the same setting, absent for any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from made_runs import counts, made_run, two_steps

from everseg.reports.baselines import joint_beside
from everseg.reports.numbers import matrix_rows
from everseg.runs.commit import read_json, save_folder
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder

JOINT: dict[str, Any] = {"steps": [{"default": counts(0.9, 0.7, 0.8)}], "groups": [(3, 1)]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(
        tmp_path, "mib", "demo-mib", **two_steps(0.8, 0.5, 0.4), overrides=["train.epochs_next=3"]
    )


def found(run: Path, refused: list[str] | None = None) -> Any:
    return joint_beside(Results(RunFolder(run)), refused)


def test_the_joint_run_beside_gives_the_last_row(run: Path) -> None:
    made_run(run.parent, "a-joint", "demo-joint", **JOINT)
    name, tracks = found(run)
    assert name == "a-joint"
    (track,) = Results(RunFolder(run)).tracks
    rows = matrix_rows(track, "_without_background", tracks["default"])
    assert [row["after step"] for row in rows] == [0, 1, "joint"]
    assert list(rows[-1].values())[1:] == pytest.approx([80.0, 80.0], abs=1e-4), "(90 + 70) / 2 and 80"
    assert list(rows[1].values())[1:] == pytest.approx([50.0, 40.0], abs=1e-4)
    assert len(matrix_rows(track)) == 2, "none where none is given"


def test_a_joint_run_has_no_joint_row_itself(run: Path) -> None:
    joint = made_run(run.parent, "a-joint", "demo-joint", **JOINT)
    made_run(run.parent, "b-joint", "demo-joint", **JOINT)
    assert found(joint) is None


@pytest.mark.parametrize(
    "change",
    ["seed=1", "train.lr=0.5", "data.crop=72", "scenario.policy=plop", "task=4-1", "scenario.order=[2,1,3,4,5,6]",
     "scenario.test_split=train", "model.norm=iabn", "data.options.num_val=7", "train.epochs=9"],
)  # fmt: skip
def test_another_setting_is_no_bound(run: Path, change: str) -> None:
    made_run(run.parent, "a-joint", "demo-joint", **JOINT, overrides=[change])
    assert found(run) is None


def test_other_test_images_or_classes_or_an_unfinished_run_are_no_bound(run: Path) -> None:
    made_run(run.parent, "a-joint", "demo-joint", **JOINT, digest="other")
    refused = list[str]()
    assert found(run, refused) is None
    assert refused == ["The joint run a-joint is left out: it was tested on other images or labels."]
    made_run(run.parent, "b-joint", "demo-joint", **JOINT)
    refused.clear()
    assert (found(run, refused)[0], refused) == ("b-joint", []), (
        "another one is taken: nobody misses the first"
    )
    shutil.rmtree(run.parent / "b-joint")
    shutil.rmtree(run.parent / "a-joint")
    made_run(run.parent, "a-joint", "demo-joint", [{"default": counts(0.9, 0.7)}], [(2, 1)])
    assert found(run) is None
    shutil.rmtree(run.parent / "a-joint")
    joint = made_run(run.parent, "a-joint", "demo-joint", **JOINT)
    assert found(run) is not None
    document = read_json(joint / "steps/00/final/classes.json")
    document["branches"]["default"]["names"][1:3] = ["c2", "c1"]
    shutil.rmtree(joint / "steps/00/final")
    save_folder(joint / "steps/00/final", {"model": {}}, {"classes": document})
    assert found(run, refused) is None, "another order"
    assert refused == ["The joint run a-joint is left out: it knows other classes, or in another order."]
    (joint / "steps/00/metrics.json").unlink()
    assert found(run) is None


def test_a_damaged_neighbour_is_passed_over(run: Path) -> None:
    joint = made_run(run.parent, "a-joint", "demo-joint", **JOINT)
    (joint / "steps/00/confusion.npz").write_bytes(b"PK")
    (run.parent / "z").mkdir()
    (run.parent / "z/run.json").write_text("{")
    assert found(run) is None
    made_run(run.parent, "b-joint", "demo-joint", **JOINT)
    assert found(run)[0] == "b-joint"


@pytest.mark.parametrize("steps", ["[]", "[{}]", '[{"test": [3]}]', '[{"test": 3}]', "3", "[3]"])
def test_a_foreign_neighbour_is_passed_over(run: Path, steps: str) -> None:
    joint = made_run(run.parent, "a-joint", "demo-joint", **JOINT)
    (joint / "scenario.json").write_text(f'{{"steps": {steps}}}')
    assert found(run) is None


def test_only_joint_neighbours_are_looked_at_closely(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(run.parent, "other", "demo-ft", **two_steps(0.8, 0.5, 0.4))
    made_run(run.parent, "z-joint", "demo-joint", **JOINT)
    results, read, whole = Results(RunFolder(run)), list[str](), RunFolder.config
    assert results.config.name == "mib"

    def noted(self: RunFolder, record: Any = None) -> Any:
        read.append(self.path.name)
        return whole(self, record)

    monkeypatch.setattr(RunFolder, "config", noted)
    assert joint_beside(results) is not None
    assert set(read) == {"z-joint"}
