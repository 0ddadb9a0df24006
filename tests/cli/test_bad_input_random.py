"""Anything at all as input ends with a message, never with a traceback."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from miniature import Everseg

from everseg.errors import DataError


def test_random_damages_of_a_run_folder_end_with_a_message_not_a_traceback(
    everseg: Everseg, done: Path
) -> None:
    random_ = random.Random(1)
    files = [path for path in sorted((done / "runs/x").rglob("*")) if path.suffix in (".json", ".npz")]
    assert len(files) == 12
    codes = set()
    for _ in range(40):
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


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_100_random_command_lines_end_with_a_message_not_a_traceback(
    everseg: Everseg, done: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise DataError("training is not part of this test")

    from everseg import api

    monkeypatch.setattr(api, "execute", stop)
    random_ = random.Random(seed)
    verbs = ["run", "eval", "predict", "list", "show", "data", "import"]
    for _ in range(100):
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
