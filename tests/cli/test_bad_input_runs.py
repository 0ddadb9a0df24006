"""Run folders that are none, are damaged or diverge: named, refused, and what lies on disk stays whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from miniature import Everseg, cut, everything, refused

from everseg.runs.commit import load_tensors, verify
from saying import must_say


def test_a_folder_that_is_no_run_is_refused(everseg: Everseg, here: Path) -> None:
    before = everything(here)
    for path, what in (("data", "neither a run"), ("nowhere", "does not exist"), ("run.yaml", "is a file")):
        refused(everseg("eval", path), 4, path, what, "needs a run folder")
        refused(
            everseg("predict", path, "data/images", "-o", "out"),
            4,
            path,
            what,
            "give a run folder",
        )
        refused(everseg("import", "mib", path, "--back", "-o", "x.pth"), 4, path, "run folder")
    assert everything(here) == before


def test_eval_of_a_step_or_with_settings_that_the_run_has_not(everseg: Everseg, done: Path) -> None:
    before = everything(done)
    refused(everseg("eval", "runs/x", "--step", "5"), 2, "--step 5", "0, 1")
    refused(everseg("eval", "runs/x", "data.rot=x"), 2, "data.rot: unknown key; did you mean 'data.root'?")
    refused(everseg("eval", "runs/x", "scenario.test_split=test", "--quiet"), 2, "no split", "test")
    refused(
        everseg("predict", "runs/x", "data/images/val", "-o", "out", "--step", "7"), 2, "--step 7", "0, 1"
    )
    assert everything(done) == before


def test_predict_refuses_what_is_no_image_before_it_writes(everseg: Everseg, done: Path) -> None:
    (done / "notes.jpg").write_text("these are notes")
    (done / "empty.png").write_bytes(b"")
    (done / "bare").mkdir()
    before = everything(done)
    outcome = everseg("predict", "runs/x", "notes.jpg", "empty.png", "data/images/val", "-o", "out")
    refused(
        outcome, 3, "2 unreadable images; nothing was written", "notes.jpg: is text", "empty.png: is empty"
    )
    refused(
        everseg("predict", "runs/x", "nowhere.jpg", "-o", "out"), 3, "no such image or folder: nowhere.jpg"
    )
    refused(everseg("predict", "runs/x", "bare", "-o", "out"), 3, "no image")
    refused(
        everseg("predict", "runs/x", "data/images/train", "data/images/val", "-o", "out"), 3, "one name: a_0"
    )
    refused(
        everseg("predict", "runs/x", "data/images/val", "-o", "run.yaml"), 4, "run.yaml", "cannot be written"
    )
    assert everything(done) == before


WEIGHTS = "runs/x/steps/01/final/model.safetensors"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        (WEIGHTS, None, "is damaged"),
        (WEIGHTS, b"", "is damaged"),
        ("runs/x/steps/01/final/classes.json", b"{}", "is damaged"),
        ("runs/x/steps/01/final/MANIFEST.json", b"[]", "is damaged"),
        ("runs/x/steps/01/final/MANIFEST.json", b'{"files": {}, "self": "0"}', "is damaged"),
        ("runs/x/steps/00/final/MANIFEST.json", None, "is damaged"),
        ("runs/x/run.json", None, "run.json"),
        ("runs/x/run.json", b"[]", "run.json"),
        ("runs/x/run.json", b"{}", "run.json"),
        ("runs/x/run.json", b'{"config": {"trian": 1}}', "run.json"),
        ("runs/x/run.json", b"\xff\xfe\x00", "run.json"),
    ],
)
def test_a_damaged_run_folder_is_refused_by_every_verb(
    everseg: Everseg, done: Path, name: str, content: bytes | None, part: str
) -> None:
    if content is None:
        cut(done / name)
    else:
        (done / name).write_bytes(content)
    before = everything(done)
    refused(everseg("eval", "runs/x", "--quiet"), 4, str(Path(name).parent), part)
    if not name.endswith("run.json"):
        refused(everseg("predict", "runs/x", "data/images/val", "-o", "out"), 4, str(Path(name).parent), part)
        refused(everseg("import", "mib", "runs/x", "--back", "-o", "x.pth"), 4, str(Path(name).parent), part)
    else:
        refused(everseg("run", "run.yaml", "--quiet"), 4, str(Path(name).parent), part)
    assert everything(done) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scenario.json", b"{"), ("scenario.json", b"[]"), ("steps/01/metrics.json", b"{"),
        ("steps/01/metrics.json", b"{}"), ("steps/01/metrics.json", b'{"branches": {"default": {}}}'),
        ("steps/01/metrics.json", b'{"branches": []}'), ("steps/01/confusion.npz", b"PK"),
        ("steps/00/confusion.npz", b""), ("steps/01/confusion.npz", None),
    ],
)  # fmt: skip
def test_damaged_results_of_a_finished_run_are_named(
    everseg: Everseg, done: Path, name: str, content: bytes | None
) -> None:
    path = done / "runs/x" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    refused(everseg("run", "run.yaml", "--quiet", "--json"), 4, f"runs/x/{name}")
    if "steps" in name:  # what the message advises
        path.with_name("metrics.json").unlink(missing_ok=True)
        assert everseg("run", "run.yaml", "--quiet").code == 0


def test_a_run_is_not_continued_with_another_architecture(everseg: Everseg, done: Path) -> None:
    before = everything(done)
    outcome = everseg("run", "run.yaml", "model.options={widths: [8,8,8,16], hidden: 8}", "--quiet")
    refused(outcome, 2, "runs/x holds a run with other settings", "model.options", "name=")
    assert everything(done) == before


def test_a_checkpoint_of_another_model_is_refused(everseg: Everseg, here: Path) -> None:
    other = "model.options={widths: [8,8,8,16], hidden: 8}"
    for arguments in (["name=a"], ["name=b", other]):
        outcome = everseg(
            "run", "run.yaml", "train.epochs=4", "train.max_time=0.000001", "--quiet", *arguments
        )
        assert outcome.code == 75
        must_say(outcome.err, "same command", "continue")
    checkpoints = here / "runs/a/steps/00/ckpt"
    shutil.rmtree(checkpoints)
    shutil.copytree(here / "runs/b/steps/00/ckpt", checkpoints)
    before = everything(here)
    outcome = everseg("run", "run.yaml", "name=a", "train.epochs=4", "--quiet")
    refused(outcome, 4, "runs/a/steps/00/ckpt", "checkpoint of another model", "instead of")
    assert everything(here) == before


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("rate", ["1e6", "1e20", "1e38"])
@pytest.mark.parametrize("epochs", [1, 30])
def test_a_diverging_run_stops_with_5_and_all_that_lies_on_disk_is_whole_and_finite(
    everseg: Everseg, here: Path, rate: str, epochs: int
) -> None:
    arguments = (
        "run",
        "run.yaml",
        f"train.lr={rate}",
        f"train.lr_next={rate}",
        f"train.epochs={epochs}",
        "--quiet",
    )
    outcome = everseg(*arguments)
    if (rate, epochs) == ("1e6", 1):
        assert outcome.code == 0
        return
    refused(outcome, 5, "iteration", "not finite", "images of the batch: a_", "lower train.lr")
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("images of the batch: ")]
    named = line.removeprefix("images of the batch: ").split(", ")
    assert len(named) == 2
    assert {*named} < {"a_0", "a_1", "a_2"}
    for path in [*here.rglob("it-*"), *here.rglob("final")]:
        verify(path)
    for path in here.rglob("*.safetensors"):
        assert [name for name, value in load_tensors(path).items() if not value.isfinite().all()] == []
    before = everything(here)
    again = everseg(*arguments)
    assert again.code == 5
    assert everything(here).keys() == before.keys()
    assert again.err == outcome.err


def test_weights_that_an_update_made_infinite_are_not_saved_and_the_earlier_checkpoint_is_used(
    everseg: Everseg, here: Path
) -> None:
    arguments = ("run", "run.yaml", "train.lr=1e6", "train.epochs=30", "--quiet")
    refused(everseg(*arguments), 5, "the update left weights that are not finite", "They were not saved")
    assert [path.name for path in sorted((here / "runs/x/steps/00/ckpt").iterdir())] == [
        "it-00000001",
        "it-00000002",
    ]
    refused(everseg("eval", "runs/x"), 4, "no finished step yet")
