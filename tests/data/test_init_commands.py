"""What `data init` proposes next: one step, an extension, or a run over two places; every command can be started."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everseg.cli import main as cli
from everseg.config import loading

Call = Callable[..., tuple[int, str]]
SMALL = ("model.options.widths=[8,8,8,8]", "model.options.hidden=8", "model.options.out_channels=8", "data.crop=16",
         "data.workers=0", "train.batch=2", "train.max_iterations=1", "train.threads=1")  # fmt: skip


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    return run


def photos(root: Path, ids: tuple[int, ...], seed: int = 0) -> None:
    for number in range(12):
        draw = np.random.default_rng([seed, number])
        mask = np.zeros((32, 32), np.uint8)
        for place, one in enumerate(ids):
            mask[4:20, 2 + 10 * place : 10 + 10 * place] = one
        for kind, pixels in (
            ("images", draw.integers(0, 256, (32, 32, 3)).astype(np.uint8)),
            ("masks", mask),
        ):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / kind / f"{number}.png")


def proposed(call: Call, *arguments: str) -> list[list[str]]:
    code, text = call("data", "init", *arguments)
    assert code == 0, text
    return [shlex.split(line)[1:] for line in re.findall(r"^  (everseg .*)$", text, re.MULTILINE)]


def test_alone_all_classes_are_learnt_at_once(call: Call, tmp_path: Path) -> None:
    photos(tmp_path / "site", (1, 2))
    commands = proposed(call, "site", "--classes", "road,tree")
    assert [command[0] for command in commands] == ["data", "run", "run"]
    assert "task=offline" in commands[1]


def test_another_place_with_the_same_classes_is_a_run_over_both(call: Call, tmp_path: Path) -> None:
    photos(tmp_path / "june", (1, 2))
    photos(tmp_path / "july", (1, 2), 1)
    proposed(call, "june", "--classes", "road,tree", "--out", "june.yaml")
    again = proposed(call, "june", "--classes", "road,tree", "--out", "again.yaml")
    assert "task=offline" in again[1]  # the same place
    (tmp_path / "again.yaml").unlink()
    commands = proposed(call, "july", "--classes", "road,tree", "--out", "july.yaml")
    config = loading.load(commands[2][1], commands[2][2:])
    assert {name: one.dataset for name, one in config.data.domains.items()} == {
        "june": "june.yaml",
        "july": "july.yaml",
    }
    code, text = call(*commands[1], "data.size=[32,32]", "data.workers=0", "train.batch=2", "--quiet")
    assert code == 0, text


def test_new_classes_beside_those_of_a_run_extend_it(call: Call, tmp_path: Path) -> None:
    photos(tmp_path / "june", (1, 2))
    photos(tmp_path / "july", (1, 2, 3), 1)
    run = proposed(call, "june", "--classes", "road,tree", "--out", "june.yaml")[2]
    code, text = call(*run, *SMALL, "--quiet")
    assert code == 0, text
    commands = proposed(call, "july", "--classes", "road,tree,sign", "--out", "july.yaml")
    assert [command[0] for command in commands] == ["data", "export", "extend"]
    assert commands[2][commands[2].index("--add") + 1] == "sign"
    code, text = call(*commands[1], "--no-onnx")
    assert code == 0, text
    code, text = call(*commands[2], "--no-onnx", "--quiet", *SMALL[3:])
    assert code == 0, text
