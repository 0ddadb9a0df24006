"""Fixtures shared by all tests: determinism, and the golden numbers where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from everseg.cli import main as cli

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indices of test data stay out of the user's cache, and no test meets those of an earlier session."""
    os.environ["EVERSEG_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the numbers of the original authors' code; the test is skipped where it is absent."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden numbers (../shared/golden) are not at hand")
    return folder


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Real images; the test is skipped where they are absent."""
    folder = SHARED / "data" / "camvid"
    if not folder.is_dir():
        pytest.skip("the CamVid images (../shared/data/camvid) are not at hand")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run
