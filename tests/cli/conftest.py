"""The command line in the test's own folder, and a finished run that a test may spoil."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from miniature import Everseg, Outcome, small

import everseg as everseg_package
from everseg.cli import main as cli


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


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return small(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `runs/x`."""
    base = small(tmp_path_factory.mktemp("trained"))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        patch.setenv("EVERSEG_CACHE", str(base / "cache"))
        everseg_package.run(base / "run.yaml", quiet=True)
    return base


@pytest.fixture
def done(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    return tmp_path
