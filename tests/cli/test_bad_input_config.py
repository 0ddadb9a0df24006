"""Wrong settings and names: named with the nearest right one, all at once, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniature import Everseg, everything, refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.lrr=0.1"], ["train.lrr: ", "'train.lr'"]),
        (["epochs=3"], ["epochs: ", "'train.epochs'"]),
        (["method.kd_wieght=3", "method=mib"], ["method.kd_wieght: ", "'method.kd_weight'"]),
        (["train.epochs=many"], ["train.epochs: ", "int >= 1", "'many'"]),
        (["train.lr=-1"], ["train.lr: ", "> 0", "-1"]),
        (["scenario.protocol=disjont"], ["scenario.protocol: ", "mean 'disjoint'"]),
        (["train.epochs"], ["'train.epochs': expected key=value"]),
        (["method=mibb"], ["method.name: ", "'mibb'", "'mib'", "everseg list methods"]),
        (["model=deeplabv3-resnet11"], ["'deeplabv3-resnet11'", "everseg list models"]),
        (["data=camvit"], ["'camvit'", "'camvid'", "everseg list datasets"]),
        (["scenario.kind=class-incremental-x"], ["mean 'class-incremental'"]),
        (["task=15-x"], ["scenario.task", "15-x"]),
        (["task=7-7"], ["scenario.task", "7-7"]),
        (["task=[[road],[car]]"], ["scenario.task", "car"]),
        (["scenario.test_split=tset"], ["no split 'tset'", "train, val", "scenario.test_split"]),
        (["model.options={widhts: [8]}"], ["model.options", "widhts", "widths"]),
        (["model.options={widths: [8]}"], ["model.options", "widths"]),
        (["model.weights=nowhere.pth"], ["model.weights: no file 'nowhere.pth'"]),
        (["data.options={clases: [a]}"], ["clases", "'classes'"]),
        (["method=mine.py:Mine"], ["method.name: no file 'mine.py'"]),
        (["train.precision=fp16"], ["train.precision", "bf16"]),
        (["data.scale=[-1,1]"], ["data.scale: ", "2 numbers > 0"]),
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
        ("train: 3\n", ["train: ", "keys and values", "got 3"]),
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
    refused(everseg("run", "voc-15-5-mbi"), 2, "voc-15-5-mbi", "'voc-15-5-mib'")
    refused(everseg("run", "nowhere.yaml"), 2, "nowhere.yaml")
    refused(everseg("run", "."), 2, ".")
    refused(everseg("list", "method"), 2, "unknown 'method'", "'methods'")
    refused(everseg("evall", "x"), 2, "evall", "eval")
    refused(everseg("eval", "x", "--stepp", "1"), 2, "--stepp", "--step")
    refused(everseg("data", "check", "camvit"), 2, "'camvid'")
    assert list(tmp_path.iterdir()) == []
