"""Bad input, end to end: one message (what, where, what to do), its exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import trees
from PIL import Image
from safetensors.torch import save_file

import everseg as package
from everseg.cli import main as cli
from everseg.errors import DataError
from everseg.interop import mib
from everseg.models.build import build_model, deeplabv3
from everseg.runs.commit import load_tensors, verify


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Everseg = Callable[..., Outcome]


@pytest.fixture
def everseg(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Everseg]:
    """Call the command line in this process, in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    yield call
    assert [path for pattern in ("*.tmp", "LOCK", "*.old") for path in tmp_path.rglob(pattern)] == []


def refused(outcome: Outcome, code: int, *parts: str) -> None:
    """One error message on stderr that holds all the parts, nothing on stdout, no traceback."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert sum(line.startswith("error:") for line in outcome.err.splitlines()) == 1
    for text in ("Traceback", "a fault of everseg", "Warning"):
        assert text not in outcome.err
    for part in parts:
        assert part in outcome.err, outcome.err


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files and folders with their content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


SETTINGS: dict[str, Any] = {
    "name": "x",
    "tensorboard": False,
    "report": False,
    "data": {"dataset": "data/data.yaml", "crop": 32, "workers": 0},
    "scenario": {"task": "1-1"},
    "model": {"name": "deeplabv3-tiny", "norm": "bn", "options": {"widths": [8, 8, 8, 8], "hidden": 8}},
    "train": {"epochs": 1, "batch": 2, "checkpoint_every": 1, "threads": 1},
}


def small(base: Path, text: str = trees.FOLDER_YAML) -> Path:
    """A healthy data set of 3 + 1 images in `data/`, and `run.yaml` that trains on it for two iterations."""
    trees.folder(base / "data", text)
    trees.save(base / "data/images/val/a_0.png", trees.image_of(7))
    (base / "run.yaml").write_text(json.dumps(SETTINGS))
    return base


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return small(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `runs/x`."""
    base = small(tmp_path_factory.mktemp("trained"))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        patch.setenv("EVERSEG_CACHE", str(base / "cache"))
        package.run(base / "run.yaml", quiet=True)
    return base


@pytest.fixture
def done(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    return tmp_path


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def test_the_healthy_miniature_trains(everseg: Everseg, here: Path) -> None:
    outcome = everseg("run", "run.yaml", "--quiet", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert [step["classes"] for step in json.loads(outcome.out)["steps"]] == [["road"], ["tree"]]


# ---------------------------------------------------------------- data: found before anything is written


def _no_folder(base: Path) -> None:
    shutil.rmtree(base / "data")


def _no_image_folder(base: Path) -> None:
    shutil.rmtree(base / "data/images")


def _no_mask_folder(base: Path) -> None:
    shutil.rmtree(base / "data/masks/train")


def _without_mask(base: Path) -> None:
    (base / "data/masks/train/a_1.png").unlink()


def _without_image(base: Path) -> None:
    (base / "data/images/val/a_0.png").unlink()
    trees.save(base / "data/images/val/b_0.png", trees.image_of(1))


def _empty_split(base: Path) -> None:
    for kind in ("images", "masks"):
        (base / f"data/{kind}/val/a_0.png").unlink()


def _empty_mask(base: Path) -> None:
    (base / "data/masks/train/a_2.png").write_bytes(b"")


def _text_mask(base: Path) -> None:
    (base / "data/masks/train/a_2.png").write_text("not a picture at all")


def _cut_mask(base: Path) -> None:
    cut(base / "data/masks/train/a_1.png", 0.7)


def _mask_is_folder(base: Path) -> None:
    (base / "data/masks/train/a_1.png").unlink()
    (base / "data/masks/train/a_1.png").mkdir()


def _colour_mask(base: Path) -> None:
    trees.save(base / "data/masks/train/a_1.png", trees.image_of(3))


def _undeclared(base: Path) -> None:
    trees.save(base / "data/masks/train/a_0.png", trees.mask_of([0, 1, 2, 7]))


def _class_of_no_image(base: Path) -> None:
    (base / "data/data.yaml").write_text("classes: [background, road, tree, ghost]\nignore: 9\n")


def _cut_image(base: Path) -> None:
    cut(base / "data/images/train/a_1.png", 0.7)


def _empty_image(base: Path) -> None:
    (base / "data/images/train/a_1.png").write_bytes(b"")


def _text_image(base: Path) -> None:
    (base / "data/images/train/a_1.png").write_text("<html>404</html>")


def _image_is_fifo(base: Path) -> None:
    (base / "data/images/train/a_1.png").unlink()
    os.mkfifo(base / "data/images/train/a_1.png")


def _other_size(base: Path) -> None:
    trees.save(base / "data/masks/train/a_1.png", trees.mask_of([0, 1, 2], (6, 8)))


BEFORE: list[tuple[Callable[[Path], None], int, tuple[str, ...]]] = [
    (_no_folder, 2, ("data/data.yaml", "no such file")),
    (_no_image_folder, 3, ("images/train", "data.yaml")),
    (_no_mask_folder, 3, ("masks/train", "check the folder")),
    (_without_mask, 3, ("1 images without mask: images/train/a_1.png", "Add the missing files")),
    (_without_image, 3, ("1 images without mask: images/val/b_0.png", "1 masks without image: masks/val/a_0.png")),
    (_empty_split, 3, ("split 'val'", "is empty", "check the folder")),
    (_empty_mask, 3, ("masks/train/a_2.png", "is empty (0 bytes)", "restore the file")),
    (_text_mask, 3, ("masks/train/a_2.png", "is text, not a picture", "restore the file")),
    (_cut_mask, 3, ("masks/train/a_1.png", "damaged or cut off", "restore the file")),
    (_mask_is_folder, 3, ("a_1.png", "without mask")),
    (_colour_mask, 3, ("masks/train/a_1.png", "a colour mask where ids are expected", "palette")),
    (_undeclared, 3, ("a_0", "id 7 (48 pixels)", "declared: 0-2, 9", "Declare these ids")),
    (_class_of_no_image, 3, ("step 2 (ghost)", "no image of split 'train' has ghost", "check the masks")),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "code", "parts"), BEFORE, ids=[case[0].__name__[1:] for case in BEFORE])
def test_faults_of_layout_and_masks_stop_a_run_before_it_writes(
    everseg: Everseg, here: Path, spoil: Callable[[Path], None], code: int, parts: tuple[str, ...]
) -> None:
    spoil(here)
    before = everything(here)
    refused(everseg("run", "run.yaml", "--quiet"), code, *parts)
    assert everything(here) == before


DURING: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (_cut_image, ("images/train/a_1.png", "damaged or cut off", "restore the file")),
    (_empty_image, ("images/train/a_1.png", "is empty (0 bytes)", "restore the file")),
    (_text_image, ("images/train/a_1.png", "is a web page", "fetch it again")),
    (_image_is_fifo, ("images/train/a_1.png", "not a regular file", "replace it")),
    (_other_size, ("masks/train/a_1.png", "16x12 but the mask 8x6", "export the mask")),
]


@pytest.mark.parametrize(("spoil", "parts"), DURING, ids=[case[0].__name__[1:] for case in DURING])
def test_faults_of_images_stop_the_run_and_the_repaired_data_continue_it(
    everseg: Everseg, here: Path, spoil: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    whole = {
        name: (here / "data" / name).read_bytes() for name in ("images/train/a_1.png", "masks/train/a_1.png")
    }
    spoil(here)
    refused(everseg("run", "run.yaml", "train.epochs=2", "--quiet"), 3, *parts)
    assert list((here / "runs").rglob("final")) == []
    for name, data in whole.items():
        (here / "data" / name).unlink()
        (here / "data" / name).write_bytes(data)
    again = everseg("run", "run.yaml", "train.epochs=2", "--quiet")
    if spoil is _other_size:  # the run has recorded the masks it was started with
        refused(again, 3, "have changed", "restore them", "name=")
    else:
        assert (again.code, again.err) == (0, "")


def test_a_bad_file_in_a_loader_process_is_reported_the_same_way(everseg: Everseg, here: Path) -> None:
    _cut_image(here)
    outcome = everseg("run", "run.yaml", "data.workers=1", "train.epochs=2", "--quiet")
    refused(outcome, 3, "images/train/a_1.png", "damaged or cut off")


def test_a_wrong_data_root_is_named(everseg: Everseg, tmp_path: Path) -> None:
    refused(everseg("run", "camvid-6-5-mib"), 2, "data.root", "pass data.root=DIR")
    refused(
        everseg("run", "camvid-6-5-mib", "data.root=nowhere"),
        2,
        "nowhere does not exist",
        "pass data.root=DIR",
    )
    (tmp_path / "file").write_text("")
    refused(everseg("run", "voc-15-5-mib", "data.root=file"), 2, "file is a file", "pass the folder")
    (tmp_path / "empty").mkdir()
    for preset, wanted in (
        ("camvid-6-5-mib", "train"),
        ("voc-15-5-mib", "JPEGImages"),
        ("ade-100-50-mib", "images"),
    ):
        refused(everseg("run", preset, "data.root=empty"), 3, "empty", wanted, "data.root=DIR")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_lists_that_name_missing_files_are_refused(everseg: Everseg, tmp_path: Path) -> None:
    base = trees.voc(tmp_path / "voc", aug=False)
    (base / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2099_000001\n")
    refused(
        everseg("run", "voc-15-5-mib", "data.root=voc"),
        3,
        "train.txt",
        "image 2099_000001",
        "Correct the list",
    )
    base = trees.camvid(tmp_path / "camvid")
    (base / "trainannot/0001TP_006690.png").unlink()
    refused(
        everseg("run", "camvid-6-5-mib", "data.root=camvid"),
        3,
        "1 images without mask: train/0001TP_006690.png",
    )
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- configuration and names


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.lrr=0.1"], ["train.lrr: unknown key; did you mean 'train.lr'?"]),
        (["epochs=3"], ["epochs: unknown key; did you mean 'train.epochs'?"]),
        (["method.kd_wieght=3", "method=mib"], ["method.kd_wieght: unknown key; did you mean 'method.kd_weight'?"]),
        (["train.epochs=many"], ["train.epochs: expected int >= 1, got 'many'"]),
        (["train.lr=-1"], ["train.lr: expected number > 0, got -1"]),
        (["scenario.protocol=disjont"], ["one of 'disjoint'", "did you mean 'disjoint'?"]),
        (["train.epochs"], ["'train.epochs': expected key=value"]),
        (["method=mibb"], ["method.name: unknown name 'mibb'; did you mean 'mib'?", "everseg list methods"]),
        (["model=deeplabv3-resnet11"], ["unknown name 'deeplabv3-resnet11'; did you mean", "everseg list models"]),
        (["data=camvit"], ["unknown name 'camvit'; did you mean 'camvid'?", "everseg list datasets"]),
        (["scenario.kind=class-incremental-x"], ["did you mean 'class-incremental'?"]),
        (["task=15-x"], ["scenario.task", "15-x"]),
        (["task=7-7"], ["scenario.task", "7-7"]),
        (["task=[[road],[car]]"], ["scenario.task", "car"]),
        (["scenario.test_split=tset"], ["no split 'tset'", "train, val", "scenario.test_split"]),
        (["model.options={widhts: [8]}"], ["model.options", "widhts", "widths"]),
        (["model.options={widths: [8]}"], ["model.options", "widths"]),
        (["model.weights=nowhere.pth"], ["model.weights: no file 'nowhere.pth'"]),
        (["data.options={clases: [a]}"], ["clases", "did you mean 'classes'?"]),
        (["method=mine.py:Mine"], ["method.name: no file 'mine.py'"]),
        (["train.precision=fp16"], ["train.precision", "bf16"]),
        (["data.scale=[-1,1]"], ["data.scale: expected list of 2 numbers > 0"]),
    ],
    ids=lambda value: value[0][:24] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_wrong_setting_is_named_and_nothing_is_written(
    everseg: Everseg, here: Path, arguments: list[str], parts: list[str]
) -> None:
    before = everything(here)
    refused(everseg("run", "run.yaml", "--quiet", *arguments), 2, *parts)
    assert everything(here) == before


def test_several_problems_are_listed_at_once_with_their_places(everseg: Everseg, here: Path) -> None:
    text = "preset: demo-mib\ntrain:\n  epochs: soon\n  learning_rate: 1\nmethod: {kd_wight: 3}\n"
    (here / "bad.yaml").write_text(text)
    outcome = everseg("run", "bad.yaml", "seed=-1", "data.crop=big")
    refused(outcome, 2, "5 problems", "train.epochs", "bad.yaml:3", "train.learning_rate", "bad.yaml:4")
    refused(outcome, 2, "method.kd_wight", "kd_weight", "seed", "data.crop")
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {epochs: 1\n", ["bad.yaml:2", "expected"]),
        ("- 1\n", ["bad.yaml", "expected keys and values"]),
        ("train: 3\n", ["train: expected keys and values, got 3"]),
        ("preset: demo-mob\n", ["demo-mob", "demo-mib"]),
        ("base: bad.yaml\n", ["bad.yaml", "itself"]),
        ("a: &a [*a]\n", ["bad.yaml"]),
        ("x: !!python/object/apply:os.system [touch owned]\n", ["bad.yaml"]),
        ("\x00\x01", ["bad.yaml"]),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    everseg: Everseg, tmp_path: Path, text: str, parts: list[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    refused(everseg("run", "bad.yaml"), 2, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_unknown_presets_verbs_and_lists_suggest_the_near_one(everseg: Everseg, tmp_path: Path) -> None:
    refused(everseg("run", "voc-15-5-mbi"), 2, "voc-15-5-mbi", "did you mean 'voc-15-5-mib'?")
    refused(everseg("run", "nowhere.yaml"), 2, "nowhere.yaml")
    refused(everseg("run", "."), 2, ".")
    refused(everseg("list", "method"), 2, "unknown 'method'", "did you mean 'methods'?")
    refused(everseg("evall", "x"), 2, "evall", "eval")
    refused(everseg("eval", "x", "--stepp", "1"), 2, "--stepp", "--step")
    refused(everseg("data", "check", "camvit"), 2, "did you mean 'camvid'?")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- data check


def test_data_check_lists_every_fault_of_a_tree_at_once(everseg: Everseg, tmp_path: Path) -> None:
    trees.write(tmp_path / "data/data.yaml", "classes: [background, road, tree, ghost, rare]\nignore: 9\n")
    for number in range(9):
        trees.save(tmp_path / f"data/images/train/a_{number}.png", trees.image_of(number, (12, 16 + number)))
        trees.save(
            tmp_path / f"data/masks/train/a_{number}.png", trees.mask_of([0, 1, 2, 9], (12, 16 + number))
        )
    for split, number in (("val", 0), ("val", 8)):
        for kind in ("images", "masks"):
            (tmp_path / f"data/{kind}/{split}").mkdir(exist_ok=True)
            name = f"a_{number}.png"
            shutil.copy(tmp_path / f"data/{kind}/train/{name}", tmp_path / f"data/{kind}/{split}/{name}")
    images, masks = tmp_path / "data/images/train", tmp_path / "data/masks/train"
    (images / "a_0.png").write_bytes(b"")
    cut(images / "a_1.png")
    (masks / "a_2.png").write_text("text")
    trees.save(masks / "a_3.png", trees.mask_of([0, 1], (5, 5)))
    trees.save(masks / "a_4.png", trees.image_of(1, (12, 20)))
    trees.save(masks / "a_5.png", trees.mask_of([0, 7, 200], (12, 21)))
    Image.fromarray(trees.mask_of([0, 1], (12, 22))).save(masks / "a_6.png", format="JPEG")
    trees.save(masks / "a_7.png", trees.mask_of([0, 4], (12, 23)))
    expected = {
        ("unreadable-image", "train", "a_0"), ("unreadable-image", "train", "a_1"),
        ("unreadable-mask", "train", "a_2"), ("size-mismatch", "train", "a_3"), ("colour-mask", "train", "a_4"),
        ("undeclared-id", "train", "a_5"), ("lossy-mask", "train", "a_6"), ("same-image", "val", "a_8"),
    }  # fmt: skip
    before = everything(tmp_path)
    outcome = everseg("data", "check", "data/data.yaml", "--json")
    assert (outcome.code, outcome.err) == (3, "")
    report = json.loads(outcome.out)
    errors = [f for f in report["findings"] if f["level"] == "error"]
    assert {(f["code"], f["split"], f["sample"]) for f in errors} == expected
    assert all(f["message"] and f["remedy"] for f in report["findings"])
    warnings = {(f["code"], f["message"].split("'")[1]) for f in report["findings"] if "class" in f["code"]}
    assert warnings >= {("class-missing", "ghost"), ("class-rare", "rare")}
    text = everseg("data", "check", "data/data.yaml", "--write-skiplist", "skip.txt")
    assert text.code == 3
    for code, split, sample in expected:
        assert f"ERROR {code}" in text.out
        assert f"{split}/{sample}: " in text.out
    assert {*(tmp_path / "skip.txt").read_text().splitlines()} == {f"{s}\t{n}" for _, s, n in expected}
    (tmp_path / "skip.txt").unlink()
    assert everything(tmp_path) == before


def test_data_check_of_a_healthy_tree_is_0_and_of_no_tree_2_or_3(everseg: Everseg, here: Path) -> None:
    assert json.loads(everseg("data", "check", "data/data.yaml", "--json").out)["ok"] is True
    refused(everseg("data", "check", "camvid", "root=nowhere"), 2, "data.root: nowhere does not exist")
    refused(everseg("data", "check", "nowhere.yaml"), 2, "nowhere.yaml")
    _without_mask(here)
    outcome = everseg("data", "check", "data/data.yaml", "--json")
    assert outcome.code == 3
    assert "a_1.png" in json.loads(outcome.out)["findings"][0]["message"]
    for name in ("none/skip.txt", "data"):
        outcome = everseg("data", "check", "data/data.yaml", "--write-skiplist", name, "--json")
        refused(outcome, 2, "--write-skiplist", name, "name a file")


# ---------------------------------------------------------------- checkpoints and run folders


def test_a_folder_that_is_no_run_is_refused(everseg: Everseg, here: Path) -> None:
    before = everything(here)
    for path in ("data", "nowhere", "run.yaml"):
        refused(everseg("eval", path), 4, f"{path} is not a run folder", "give the folder")
        refused(
            everseg("predict", path, "data/images", "-o", "out"),
            4,
            f"{path} holds no model",
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


def test_random_damages_of_a_run_folder_end_with_a_message_not_a_traceback(
    everseg: Everseg, done: Path
) -> None:
    random_ = random.Random(1)
    files = [path for path in sorted((done / "runs/x").rglob("*")) if path.suffix in (".json", ".npz")]
    assert len(files) == 12
    codes = set()
    for _ in range(80):
        path = random_.choice(files)
        whole = path.read_bytes()
        spoilt = bytearray(whole)
        if random_.random() < 0.3:
            del spoilt[random_.randrange(len(whole)) :]
        for _ in range(random_.choice([0, 1, 1, 5]) if len(spoilt) else 0):
            spoilt[random_.randrange(len(spoilt))] = random_.choice(b'0x"{}[],:\x00\xff')
        path.write_bytes(spoilt)
        for arguments in (
            ("run", "run.yaml", "--quiet"),
            ("predict", "runs/x", "data/images/val", "-o", "out"),
        ):
            outcome = everseg(*arguments)
            codes.add(outcome.code)
            assert outcome.code in (0, 2, 3, 4), (path, bytes(spoilt), outcome)
            assert "Traceback" not in outcome.err
        path.write_bytes(whole)
    assert {0, 4} <= codes


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
        assert "run the same command to continue" in outcome.err
    checkpoints = here / "runs/a/steps/00/ckpt"
    shutil.rmtree(checkpoints)
    shutil.copytree(here / "runs/b/steps/00/ckpt", checkpoints)
    before = everything(here)
    outcome = everseg("run", "run.yaml", "name=a", "train.epochs=4", "--quiet")
    refused(outcome, 4, "runs/a/steps/00/ckpt", "checkpoint of another model", "instead of")
    assert everything(here) == before


class Touch:
    """Pickled, it would create a file when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch owned",)


def test_import_refuses_what_is_no_mib_checkpoint_and_never_runs_code(
    everseg: Everseg, tmp_path: Path
) -> None:
    torch.save({"model_state": {"a": torch.zeros(1)}, "trainer_state": Touch()}, tmp_path / "code.pth")
    torch.save({"model_state": {"module.body.a": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model_state": {}}, tmp_path / "bare.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    shutil.copy(tmp_path / "other.pth", tmp_path / "cut.pth")
    cut(tmp_path / "cut.pth")
    before = everything(tmp_path)
    for name, part in (
        ("code.pth", "could run code"), ("other.pth", "not a complete checkpoint of MiB"), ("list.pth", "a list"),
        ("bare.pth", "holds no weights"), ("other.safetensors", "not a complete checkpoint of MiB"),
        ("text.pth", "damaged"), ("empty.pth", "damaged"), ("cut.pth", "damaged"),
    ):  # fmt: skip
        refused(everseg("import", "mib", name, "-o", "out"), 4, name, part)
    refused(everseg("import", "mib", "nowhere.pth", "-o", "out"), 2, "'nowhere.pth': no such file")
    refused(everseg("import", "mib", ".", "-o", "out"), 2, "'.': no such file")
    assert everything(tmp_path) == before


def test_initial_weights_that_do_not_fit_or_are_not_finite_are_refused(everseg: Everseg, here: Path) -> None:
    from everseg.config.fields import ModelConfig

    model = build_model(ModelConfig(**SETTINGS["model"]))
    state = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    save_file(state, here / "good.safetensors")
    first = next(name for name in state if name.endswith("weight"))
    state[first].view(-1)[3] = float("nan")
    save_file(state, here / "nan.safetensors")
    torch.save({"a": torch.zeros(1), "b": Touch()}, here / "code.pth")
    torch.save({"a": torch.zeros(1)}, here / "other.pth")
    before = everything(here)
    for name, parts in (
        ("nan.safetensors", ("not finite", first)), ("code.pth", ("could run code",)), ("other.pth", ("conv1",)),
    ):  # fmt: skip
        refused(everseg("run", "run.yaml", f"model.weights={name}", "--quiet"), 4, name, *parts)
    assert everything(here) == before
    assert everseg("run", "run.yaml", "model.weights=good.safetensors", "--quiet", "--dry-run").code == 0


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


# ---------------------------------------------------------------- folders and disks that cannot be written


def test_a_run_folder_that_cannot_be_made_is_named(everseg: Everseg, here: Path) -> None:
    before = everything(here)
    for out in ("run.yaml", "run.yaml/deeper", "/proc/everseg", "/proc/sys/everseg"):
        refused(
            everseg("run", "run.yaml", f"out={out}", "--quiet"),
            4,
            f"{out}/x",
            "cannot be written",
            "choose another folder",
        )
    refused(
        everseg("import", "mib", "run.yaml", "-o", "run.yaml"), 2, "run.yaml is a file", "give a new folder"
    )
    assert everything(here) == before


def test_a_file_in_place_of_the_run_folder_is_named(everseg: Everseg, here: Path) -> None:
    (here / "runs").mkdir()
    (here / "runs/x").write_text("mine")
    before = everything(here)
    refused(everseg("run", "run.yaml", "--quiet"), 4, "runs/x", "cannot be written", "choose another folder")
    assert everything(here) == before


def test_a_cache_that_cannot_be_written_is_one_warning(
    everseg: Everseg, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSEG_CACHE", str(here / "run.yaml"))
    outcome = everseg("run", "run.yaml", "--dry-run", "--quiet")
    assert outcome.code == 0
    lines = {line for line in outcome.err.splitlines() if line.startswith("warning: ")}
    assert lines == {*outcome.err.splitlines()}
    assert len(lines) == 1
    assert "Set EVERSEG_CACHE to a folder that can be written" in outcome.err


def forked(limit: int | None, *arguments: str, user: int | None = None) -> Outcome:
    """The command line in a child process.

    Args:
        limit: no file may grow beyond so many bytes: a disk that is full there.
        user: whose permissions the child has.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = sys.stderr = os.fdopen(writer, "w")
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if user is not None:
                os.setuid(user)
            cli.main(arguments)
        except SystemExit as stop:
            sys.stderr.flush()
            os._exit(int(stop.code or 0))
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    kept = [
        line for line in text.splitlines() if not line.startswith("warning: The class index cannot be cached")
    ]
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "", "\n".join(kept))


@pytest.mark.parametrize("limit", [0, 10, 400, 1500, 8000, 30000])
def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_later(
    everseg: Everseg, here: Path, limit: int
) -> None:
    outcome = forked(limit, "run", "run.yaml", "train.epochs=2", "--quiet")
    refused(outcome, 4, "disk full", "runs/x", "free some space and run again")
    assert [path for pattern in ("*.tmp", "LOCK") for path in (here / "runs").rglob(pattern)] == []
    for path in [*here.rglob("final"), *here.rglob("it-*")]:
        verify(path)
    for path in here.rglob("*.json"):
        json.loads(path.read_text())
    if limit <= 400:  # not even run.json
        assert [path for path in (here / "runs").rglob("*") if path.is_file()] == []
    assert everseg("run", "run.yaml", "train.epochs=2", "--quiet").code == 0


def test_permissions_of_data_and_run_folder_are_named(
    everseg: Everseg, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    nobody = 65534 if os.geteuid() == 0 else None  # permissions do not bind root
    package_file = Path(cli.__file__)
    if nobody is not None and not all(folder.stat().st_mode & 0o001 for folder in package_file.parents):
        pytest.skip("another user cannot read the package here")
    with tempfile.TemporaryDirectory() as name:
        base = small(Path(name))
        base.chmod(0o755)
        monkeypatch.chdir(base)
        assert everseg("run", "run.yaml", "--dry-run", "--quiet").code == 0  # all modules are imported now
        mask = base / "data/masks/train/a_1.png"
        mask.chmod(0)
        outcome = forked(None, "run", "run.yaml", "--quiet", user=nobody)
        refused(outcome, 3, "masks/train/a_1.png", "Permission denied", "check its permissions")
        mask.chmod(0o644)
        (base / "runs").mkdir(mode=0o555)
        outcome = forked(None, "run", "run.yaml", "--quiet", user=nobody)
        refused(outcome, 4, "runs/x", "no permission to write here", "choose another folder")
        assert list((base / "runs").iterdir()) == []


def test_predict_on_a_full_disk_leaves_no_half_picture(everseg: Everseg, done: Path) -> None:
    outcome = forked(10, "predict", "runs/x", "data/images/val", "-o", "out")
    refused(outcome, 4, "disk full", "out/a_0_mask.png", "free some space")
    assert [path for path in (done / "out").rglob("*") if path.is_file()] == []


def test_import_back_on_a_full_disk_leaves_no_file(everseg: Everseg, done: Path) -> None:
    model = deeplabv3(
        blocks=(1, 1, 1, 1), bottleneck=False, stem=8, widths=(8, 8, 8, 8), hidden=8, out_channels=8
    )
    model.grow({"default": 3})
    torch.save({"model_state": mib.dump(model)}, "theirs.pth")
    everseg("import", "mib", "theirs.pth", "-o", "ours", "--norm", "abn")
    outcome = forked(1000, "import", "mib", "ours", "--back", "-o", "x.pth")
    refused(outcome, 4, "x.pth", "disk full")
    assert [path.name for path in done.glob("x.pth*")] == []


def test_import_back_of_a_model_the_original_cannot_express_is_refused(everseg: Everseg, done: Path) -> None:
    outcome = everseg("import", "mib", "runs/x", "--back", "-o", "x.pth")
    refused(outcome, 2, "cannot express", "pools after the stem", "dilations")
    assert list(done.glob("x.pth*")) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_message() -> None:
    source = str(Path(cli.__file__).resolve().parents[2])
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "everseg", "list", "presets"],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source}, check=False,
        )  # fmt: skip
    refused(Outcome(ended.returncode, "", ended.stderr), 4, "No space left")


# ---------------------------------------------------------------- anything at all


WORDS = [
    "run", "eval", "predict", "list", "show", "data", "check", "import", "mib", "--json", "--quiet", "--dry-run",
    "--step", "--out", "-o", "--back", "--norm", "--yaml", "--scenario", "--no-scenario", "--debug", "--help", "--",
    "--output-stride", "run.yaml", "data/data.yaml", "runs/x", "runs/x/steps/00", "data", "nowhere", "camvid", "voc",
    "voc-15-5-mib", "camvid-6-5-mib", "methods", "tasks", "presets", "policies", "abn", "0", "1", "-1", "8", "1e400",
    "", "=", "a=", "=b", "a.b.c=1", "train.epochs=0", "train={", "task=[[1],[1]]", "method=", "method=ft", "data=voc",
    "data.root=data", "data.options={a: b}", "data.options=3", "scenario=.py:x", "model=:", "seed=99999999999999999999",
    "order=[tree,road]", "scenario.order=[tree,road]", "scenario.joint=true", "\x00", "\udcff", "é", "data/images/val",
    "name=../../y", "name=", "out=", "preset=x", "base=run.yaml", "train.lr=nan", "train.lr=.inf", "~", "/", ".", "..",
]  # fmt: skip


def test_300_random_command_lines_end_with_a_message_not_a_traceback(
    everseg: Everseg, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise DataError("training is not part of this test")

    from everseg import api

    monkeypatch.setattr(api, "execute", stop)
    random_ = random.Random(0)
    verbs = ["run", "eval", "predict", "list", "show", "data", "import"]
    deadline = time.monotonic() + 20
    count = 0
    while count < 300 and time.monotonic() < deadline:
        arguments = [random_.choice(verbs), *random_.choices(WORDS, k=random_.randrange(6))]
        if arguments[0] == "data" and random_.random() < 0.8:
            arguments.insert(1, "check")
        if arguments[0] == "import" and random_.random() < 0.8:
            arguments.insert(1, "mib")
        outcome = everseg(*(a for a in arguments if a != "--debug"))
        assert outcome.code in (0, 2, 3, 4), (arguments, outcome)
        assert "Traceback" not in outcome.err, arguments
        assert "fault of everseg" not in outcome.err, arguments
        assert (outcome.code in (0, 3)) or outcome.err, arguments
        count += 1
    assert count >= 100
