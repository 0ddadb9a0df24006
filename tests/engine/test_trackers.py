"""W&B, MLflow and Trackio: what reaches them, and that none can end a run; the real ones where they are installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import accelerate.tracking
import numpy as np
import pytest
from accelerate import PartialState

from everseg.config.loading import identity, load
from everseg.engine import trackers
from everseg.engine.events import Events
from everseg.engine.run import _places
from everseg.engine.trackers import Tracker, check_installed
from everseg.errors import ConfigError
from saying import must_say


class Fake:
    """Accelerate's tracker imitated."""

    made: list[Fake]
    full = False

    def __init__(self, **given: Any) -> None:
        self.given, self.told, self.pictures, self.finished = given, [], [], 0
        self.made.append(self)

    def start(self) -> None:
        print("a service's own words")
        if self.given["name"].startswith("refused"):
            raise PermissionError(13, "no folder for it")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        if self.full:
            raise RuntimeError("the service went away")
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    made: type[Fake] = type("Made", (Fake,), {"made": []})
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", made)
    for variable in ("TRACKIO_PROJECT", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return made


def tracker(folder: Path, kind: str = "trackio", name: str = "run", **settings: Any) -> Tracker:
    return Tracker(kind, name, identity(load(**settings)), folder)


def train(events: Events, first: int = 1) -> None:
    events.scalars(first, {"ce": 2.0}, lr=0.1, images_per_second=3.0)
    events.evaluation(
        first, 0, ["background", "road"], {"miou": {"all": 0.5}, "class_iou": [0.5, None]}, np.eye(2, dtype=np.int64),
        [(np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8), np.int64), np.zeros((6, 8), np.int64))],
        background=0,
    )  # fmt: skip


def test_a_list_may_be_written_with_commas_and_the_former_key_is_read() -> None:
    assert load(overrides=["tracker=wandb, trackio"]).tracker == ["wandb", "trackio"]
    assert load(overrides=["tracker="]).tracker == load(tracker=[]).tracker == []
    assert load(overrides=["metrics=boundary-iou,per-image"]).metrics == ["boundary-iou", "per-image"]
    assert (load().tracker, load(tensorboard=False).tracker) == (["tensorboard"], [])
    assert load(tensorboard=True, tracker=["wandb"]).tracker == ["wandb"]
    with pytest.raises(ConfigError) as stop:
        load(overrides=["tracker=wandbb"])
    must_say(str(stop.value), "tracker", "'wandb'", "'trackio'")
    with pytest.raises(ConfigError, match="tensorboard"):
        load(overrides=["tensorboard=perhaps"])


def test_a_tracker_gets_the_numbers_and_the_settings_without_folders(
    fake: type[Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first in (1, 2):  # begun, and resumed
        place = tracker(tmp_path, name="one", data={"root": str(tmp_path / "someone")}, task="2-1")
        events = Events([place])
        train(events, first)
        events.close()
        events.close()
    one, two = fake.made
    assert one.given == two.given
    assert one.given["name"] == f"one-{(tmp_path / 'trackers' / 'id').read_text()}"
    (step, numbers), (_, scores) = one.told
    assert (step, numbers["train/loss/ce"], numbers["sys/img_s"]) == (1, 2.0, 3.0)
    assert scores == {"val/miou/all": 0.5, "val/iou/background": 0.5}
    assert (one.finished, two.finished) == (1, 1)
    assert one.settings["scenario.task"] == "2-1"
    assert "someone" not in json.dumps(one.settings)
    assert capsys.readouterr().out == ""  # stdout is the result's


def test_a_run_elsewhere_or_with_a_damaged_id_is_another_one(fake: type[Fake], tmp_path: Path) -> None:
    for name in ("a", "b", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        tracker(tmp_path / name)
        (tmp_path / "b" / "trackers").mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / "trackers" / "id").write_text("../../elsewhere")
    names = [each.given["name"] for each in fake.made]
    assert len(set(names)) == 3
    assert not any("elsewhere" in name for name in names)


def test_a_service_that_does_not_start_is_said_before_training(fake: type[Fake], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as stop:
        tracker(tmp_path, name="refused")
    must_say(str(stop.value), "Trackio", "no folder for it", "TRACKIO_DIR", "tracker=")


def test_a_service_that_goes_away_ends_with_one_note_and_the_others_go_on(
    fake: type[Fake], tmp_path: Path
) -> None:
    notes: list[str] = []
    (tmp_path / "other").mkdir()
    places = [tracker(folder) for folder in (tmp_path, tmp_path / "other")]
    events = Events(places, notify=notes.append)
    fake.made[0].full = True
    train(events)
    train(events, 2)
    assert [len(each.told) for each in fake.made] == [0, 4]
    assert [each.finished for each in fake.made] == [1, 0]
    assert len(notes) == 1
    must_say(notes[0], "Trackio", "the service went away", "journal")


def test_what_is_not_installed_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_installed(load().tracker)  # TensorBoard's absence is a note
    with pytest.raises(ConfigError) as stop:
        check_installed(["wandb", "mlflow"])
    for name in ("wandb", "mlflow"):
        must_say(str(stop.value), f"everseg[{name}]", name)


def test_where_one_service_does_not_start_those_that_did_are_closed(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing: type[Fake] = type(
        "Refusing", (fake,), {"start": lambda self: exec("raise OSError('no server')")}
    )
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "mlflow", refusing)
    monkeypatch.setattr(trackers, "_beginning", lambda kind, name, *_: {"name": name})
    with pytest.raises(ConfigError, match="no server"):
        _places(["trackio", "mlflow", "trackio"], {}, tmp_path, print)
    assert [each.finished for each in fake.made] == [1, 0]


# ---------------------------------------------------------------- the real ones, offline


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def real(kind: str, folder: Path) -> None:
    """Write as a run does that was interrupted once."""
    PartialState(cpu=True)  # a run has joined the other processes by then
    for first in (1, 2):
        notes: list[str] = []
        events = Events([tracker(folder, kind, "real")], notify=notes.append)
        train(events, first)
        events.scalars(first, {"ce": float("nan")}, lr=0.1, images_per_second=3.0)
        events.close()
        assert notes == []


@installed("wandb")
def test_wandb_keeps_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    real("wandb", tmp_path)
    identifier = (tmp_path / "trackers" / "id").read_text()
    kept = sorted((tmp_path / "trackers" / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))
    assert len(kept) in (1, 2)  # named after the second
    text = kept[0].read_bytes()
    assert b"train/loss/ce" in text
    assert b"val/miou/all" in text
    assert [*(tmp_path / "trackers").rglob("*.png")]  # pictures
    assert capsys.readouterr().out == ""


@installed("mlflow")
def test_mlflow_keeps_one_run_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/curves.db")
    real("mlflow", tmp_path)
    import mlflow

    (run,) = mlflow.search_runs(experiment_names=["everseg"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val/miou/all")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.5)]
    assert run.data.params["train.lr"] == str(load().train.lr)
    assert run.info.status == "FINISHED"


@installed("trackio")
def test_trackio_keeps_one_run_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [
        name for name in sys.modules if name.startswith("trackio")
    ]:  # it reads the variable at its import
        monkeypatch.delitem(sys.modules, name)
    real("trackio", tmp_path)
    import trackio

    (run,) = trackio.Api().runs("everseg")
    assert run.name.startswith("real-")
