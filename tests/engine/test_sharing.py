"""A first step that several runs have in common: only where it is the same to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import domain_toy
import pytest
from processes import complete, results
from toy import settings

from everseg.config.loading import load
from everseg.engine.sharing import first_step_hash, obstacle, share_first_step
from everseg.errors import CheckpointError
from everseg.runs.run_folder import RunFolder
from saying import must_say
from sealed import rewrite

SHORT = {"epochs": 1, "epochs_next": 1, "max_iterations": 4}


def manifest(final: Path) -> dict[str, Any]:
    return json.loads((final / "MANIFEST.json").read_text())["files"]


def test_over_domains_the_claim_holds_too(tmp_path: Path) -> None:
    finals = []
    for name in ("ft", "mdil"):
        given = domain_toy.settings(tmp_path / name, method={"name": name})
        given["train"] |= {"epochs": 1, "max_iterations": 2}
        assert complete(given) == 0
        finals.append(manifest(tmp_path / name / "domains/steps/00/final"))
    assert finals[0] == finals[1]


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (["method=mib"], True),
        (["method=lwf", "method.kd_weight=3"], True),
        (["name=x", "out=y", "data.workers=0", "train.epochs_next=9", "train.lr_next=0.5"], True),
        (["method=mib", "method.bce=true"], False),
        (["method=ewc"], False),
        (["method=mdil", "method.updates=two-legacy"], False),
        (["metrics=[per-image]"], False),
        (["metrics=[]"], True),
        (["seed=1"], False),
        (["train.epochs=2"], False),
        (["train.threads=2"], False),
        (["scenario.task=4-1"], False),
        (["data.options.num_train=9"], False),
        (["model.norm=bn"], False),
    ],
)
def test_what_makes_first_steps_the_same(overrides: list[str], same: bool) -> None:
    base = load("demo-ft", ["model.norm=abn"])
    other = load("demo-ft", ["model.norm=abn", *overrides])
    assert (first_step_hash(base) == first_step_hash(other)) is same


def test_joint_runs_and_scenarios_of_the_users_own_never_share() -> None:
    assert first_step_hash(load("demo-joint")) is None
    assert first_step_hash(load("demo-ft", ["scenario.kind=my.py:build"])) is None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuning and MiB, each trained alone."""
    out = tmp_path_factory.mktemp("alone")
    for name in ("ft", "mib"):
        given = settings(out, name=name, method={"name": name}, train={**settings(out)["train"], **SHORT})
        assert complete(given) == 0
    return out


def test_a_run_with_a_shared_first_step_is_the_run_trained_alone(alone: Path, tmp_path: Path) -> None:
    source, target = RunFolder(alone / "ft"), RunFolder(tmp_path / "mib")
    assert share_first_step(source, target)
    assert not share_first_step(source, target), "it has begun now"
    given = settings(tmp_path, name="mib", method={"name": "mib"})
    assert complete({**given, "train": {**given["train"], **SHORT}}) == 0
    assert results(target.path) == results(alone / "mib")
    names = {str(p.relative_to(target.path)) for p in target.path.rglob("*")}
    assert names == {str(p.relative_to(alone / "mib")) for p in (alone / "mib").rglob("*")}
    lines = [json.loads(line) for line in (target.path / "journal.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (alone / "mib" / "journal.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"], e["iteration"]) for e in lines] == [
        (e["event"], e["step"], e["iteration"]) for e in other
    ]


def test_a_damaged_first_step_is_not_shared(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "ft", tmp_path / "ft")
    weights = tmp_path / "ft/steps/00/final/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="sha256 mismatch"):
        share_first_step(RunFolder(tmp_path / "ft"), RunFolder(tmp_path / "mib"))
    assert not (tmp_path / "mib" / "steps").exists()


def test_a_folder_begun_with_other_settings_gets_no_first_step(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "mib").mkdir()
    shutil.copy(alone / "mib/run.json", tmp_path / "mib")
    rewrite(tmp_path / "mib/run.json", lambda stored: stored["config"].update(seed=9))
    assert not share_first_step(RunFolder(alone / "ft"), RunFolder(tmp_path / "mib"))
    assert not (tmp_path / "mib/steps/00").exists()


def test_other_threads_and_versions_are_told(alone: Path, tmp_path: Path) -> None:
    source = RunFolder(alone / "ft")
    assert obstacle(source, 1) == ""
    assert "1 CPU threads, not 2" in obstacle(source, 2)
    (tmp_path / "ft").mkdir()
    shutil.copy(alone / "ft/run.json", tmp_path / "ft")
    rewrite(tmp_path / "ft/run.json", lambda stored: stored["versions"].update(torch="1.0"))
    must_say(obstacle(RunFolder(tmp_path / "ft"), 1), "ft", "torch")
