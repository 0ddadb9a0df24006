"""Folders and disks that cannot be written: one message, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from miniature import Everseg, Outcome, everything, refused, small

from everseg.cli import main as cli
from everseg.interop import mib
from everseg.models.build import deeplabv3
from everseg.runs.commit import verify


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
    assert "EVERSEG_CACHE" in outcome.err
    assert "can be written" in outcome.err


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
    refused(outcome, 4, "disk full", "runs/x", "larger than a file may be", "raise the limit")
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
    refused(outcome, 4, "disk full", "out/a_0_mask.png", "raise the limit")
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_message() -> None:
    source = str(Path(cli.__file__).resolve().parents[2])
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "everseg", "list", "presets"],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source}, check=False,
        )  # fmt: skip
    refused(Outcome(ended.returncode, "", ended.stderr), 4, "disk full: the output", "no space left")
