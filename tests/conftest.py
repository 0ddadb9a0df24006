"""Fixtures shared by all tests: determinism, and the golden numbers where they are at hand."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from everseg.cli import main as cli

SHARED = Path(__file__).resolve().parents[2] / "shared"


OF_THE_MACHINE = re.compile(
    "SLURM_.*|ACCELERATE_.*|(LOCAL_|GROUP_)?RANK|(LOCAL_|GROUP_)?WORLD_SIZE|MASTER_(ADDR|PORT)"  # a launcher's job
    "|FORCE_COLOR|NO_COLOR|CLICOLOR.*|TTY_.*|COLUMNS|LINES"  # the terminal
)
"""Variables that change what everseg does or prints; no test meets those of whoever starts the tests."""


def pytest_configure() -> None:
    for name in filter(OF_THE_MACHINE.fullmatch, list(os.environ)):
        del os.environ[name]
    os.environ["no_proxy"] = "127.0.0.1,localhost"  # the servers that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {}
    if not config.getoption("--slow"):
        skipped["slow"] = pytest.mark.skip(reason="slow: run with --slow")
    if os.environ.get("EVERSEG_REAL") != "1":
        skipped["real"] = pytest.mark.skip(reason="real: run with EVERSEG_REAL=1")
    for item in items:
        for name, mark in skipped.items():
            if item.get_closest_marker(name):
                item.add_marker(mark)


def pytest_collection_finish() -> None:
    """Take all that is imported by now out of the garbage collector's sight.

    Accelerate collects after every step of a run. Among the objects of all tests and libraries that was a third of a
    small run's time, more in a forked one.
    """
    gc.collect()
    gc.freeze()


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
