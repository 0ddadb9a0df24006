"""Documents of a run folder that lie: told with file and key, or harmless; never a fault, never waited for."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everseg
from everseg.errors import CheckpointError, EversegError
from everseg.reports.compare.comparison import collect
from everseg.reports.html import assemble
from everseg.runs import run_folder
from everseg.runs.commit import canonical_hash, write_document
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder
from hostile_documents import NO_DOCUMENT, flips, special_files, variants
from sealed import content, put_arrays

METRICS = "steps/01/metrics.json"
DOCUMENTS = ("run.json", "scenario.json", METRICS)
SETTINGS: dict[str, Any] = {
    "name": "demo-mib", "tracker": [], "report": False,
    "data": {"dataset": "demo", "options": {"size": [48, 64], "num_train": 8, "num_val": 4}, "crop": 32, "workers": 0},
    "model": {"name": "deeplabv3-tiny", "options": {"widths": [8, 8, 8, 8], "hidden": 8, "norm": "bn"}},
    "method": "mib",
    "train": {"batch": 4, "max_iterations": 1, "threads": 1},
    "metrics": ["boundary-iou", "per-image"],
}  # fmt: skip


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    return everseg.run({**SETTINGS, "out": str(tmp_path_factory.mktemp("honest"))}, quiet=True).path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "demo-mib"))


def everything(run: Path) -> str:
    """All that a report without pictures and a comparison read of a run; the text tells whether anything differs."""
    results = Results(RunFolder(run))
    notes: list[str] = []
    page = assemble(results, None, [], notes)
    figures = [(track.scores, track.boundary_scores) for track in results.tracks]
    images = [(name, each.tolist()) for step in results.steps for name, each in step.images.items()]
    table = collect([run])[0]["tables"]
    about = (
        results.config,
        results.record,
        results.sequence,
        results.planned,
        [s.metrics for s in results.steps],
    )
    return repr((about, figures, images, page.facts, page.data, page.parts, notes, table))


def outcome(run: Path) -> str:
    """What reading everything ends with: the message, or the text of all that was read. Other exceptions are faults."""
    try:
        return everything(run)
    except EversegError as error:
        return f"exit {error.exit_code}: {error}"


def check_wrong_values(run: Path, most: int) -> None:
    """Put wrong values in the places of every document. Whoever writes such a file makes its checksum fit."""
    draw = random.Random(16)
    for name in DOCUMENTS:
        whole = content(run / name)
        made = list(variants(whole))
        for what, document in draw.sample(made, min(len(made), most)):
            write_document(run / name, document)
            try:
                said = outcome(run)
            except Exception as error:
                raise AssertionError(f"{name}: {what}: {error!r}") from error
            # Settings may be plain and name what is not there: then the message names that.
            told = (
                Path(name).name in said or "not finished" in said or (name == "run.json" and str(run) in said)
            )
            assert not said.startswith("exit") or (said[5] in "24" and told), (name, what, said)
        write_document(run / name, whole)


def test_wrong_values_in_documents_are_told_or_harmless(run: Path) -> None:
    check_wrong_values(run, 15)


@pytest.mark.slow
def test_many_wrong_values_in_documents_are_told_or_harmless(run: Path) -> None:
    check_wrong_values(run, 40)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_no_document_is_damage(run: Path, name: str) -> None:
    for what, data in NO_DOCUMENT.items():
        (run / name).write_bytes(data)
        assert outcome(run).startswith("exit 4"), what
        assert Path(name).name in outcome(run), what


@pytest.mark.parametrize(
    "name", [*DOCUMENTS, "journal.jsonl", "steps/01/confusion.npz", "steps/01/images.npz"]
)
def test_what_is_no_file_is_not_waited_for_nor_followed(run: Path, name: str) -> None:
    outside = run.parent / "outside"
    shutil.copy(run / name, outside)
    for what, put in special_files(run / name, outside).items():
        put()
        said = outcome(run)
        assert Path(name).name in said or "not finished" in said, what
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def test_a_folder_of_a_step_does_not_lead_out(run: Path) -> None:
    shutil.move(run / "steps", run.parent / "elsewhere")
    (run / "steps").symlink_to(run.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out"):
        everything(run)


def test_a_file_larger_than_any_document_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (run / "run.json").open("r+b") as file:
        file.truncate(50_000_000_000)  # without taking room
    with pytest.raises(CheckpointError, match="larger than 16 MB"):
        everything(run)


# ---------------------------------------------------------------- checksums


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flipped_bit_is_noticed_or_says_the_same(run: Path, name: str) -> None:
    """On a small document of each kind: only turns that leave every value as it was get through."""
    folder, path = RunFolder(run), run / name
    read = {"run.json": folder.record, "scenario.json": folder.scenario, METRICS: lambda: folder.scored(1)}[
        name
    ]
    small = {
        "run.json": {
            "config": {"seed": 3},
            "threads": 1,
            "argv": ["everseg", "run", "x"],
            "versions": {"torch": "2"},
        },
        "scenario.json": {"steps": [], "notes": ["a note"]},
        METRICS: {"branches": {}, "step": 1, "files": {}},
    }
    write_document(path, small[name])
    before, caught, harmless = read(), 0, 0
    for bit, data in flips(path):
        path.write_bytes(data)
        try:
            assert read() == before, f"bit {bit}: another content"
            harmless += 1
        except CheckpointError:
            caught += 1
    assert harmless <= 2, f"{caught} caught, {harmless} harmless"


def check_flips(run: Path, number: int) -> None:
    """Turn single bits of whole files: the same content is read, or the damage is told."""
    draw, caught = random.Random(3), 0
    before = everything(run)
    files = (*DOCUMENTS, "steps/01/confusion.npz", "steps/01/images.npz")
    for name in files:
        whole = (run / name).read_bytes()
        for _ in range(number):
            data = bytearray(whole)
            data[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            (run / name).write_bytes(data)
            found = outcome(run)
            caught += found != before
            assert found == before or found.startswith("exit 4"), name
        (run / name).write_bytes(whole)
    assert caught >= 0.95 * number * len(files)


def test_flipped_bits_change_nothing_unnoticed(run: Path) -> None:
    check_flips(run, 6)


@pytest.mark.slow
def test_many_flipped_bits_change_nothing_unnoticed(run: Path) -> None:
    check_flips(run, 30)


def test_a_document_of_an_earlier_version_has_no_checksum(run: Path) -> None:
    before = everything(run)
    for name in DOCUMENTS:
        (run / name).write_text(json.dumps(content(run / name)))
    stored = content(run / METRICS)
    del stored["files"]
    (run / METRICS).write_text(json.dumps({**stored, "sha256": canonical_hash(stored)}))
    assert everything(run) == before
    (run / METRICS).write_text(json.dumps({**stored, "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="checksum"):
        everything(run)


# ---------------------------------------------------------------- arrays


def header(descr: str, shape: str = "(2, 2)") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


ARRAYS = {
    "huge items": header("'|V1500000000'"),
    "a huge shape": header("'<i8'", f"({10**12}, {10**6})"),
    "negative": header("'<i8'", "(-1, 2)"),
    "objects": header("'|O'") + b"\x80\x04N.",
    "fields": header("[('a', '<i8')]") + bytes(32),
    "text": header("'<U1000000'"),
    "cut": header("'<i8'") + bytes(8),
    "longer": header("'<i8'") + bytes(64),
    "code": b"\x93NUMPY\x01\x00\x30\x00" + b"__import__('os').system('touch imported')".ljust(48),
    "nested": b"\x93NUMPY\x01\x00\xf0\xff" + b"(" * 65520,
    "no magic": b"NUMPY",
}


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("name", ["confusion.npz", "images.npz"])
def test_an_array_is_no_larger_than_its_bytes(run: Path, name: str, case: str) -> None:
    import zipfile

    path = run / "steps/01" / name
    put_arrays(path, default=np.zeros((2, 2)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("default.npy", ARRAYS[case])
    stored = content(run / METRICS)
    del stored["files"]  # as in older runs: no checksum stands in the way
    write_document(run / METRICS, stored)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        everything(run)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("confusion.npz", np.zeros((7, 7), np.float64)),
        ("confusion.npz", np.zeros((7, 6), np.int64)),
        ("confusion.npz", np.zeros((2, 2), np.int64)),
        ("confusion.npz", np.full((7, 7), -1, np.int64)),
        ("confusion.npz", np.zeros((7, 7, 1), np.int64)),
        ("images.npz", np.zeros((4, 3, 7), np.int64)),
        ("images.npz", np.zeros((4, 2, 7), np.uint32)),
        ("images.npz", np.zeros((4, 3), np.uint32)),
        ("boundary.npz", np.zeros((4, 2, 7), np.uint32)),
        ("boundary.npz", np.zeros((4, 3, 6), np.uint32)),
    ],
)
def test_an_array_has_its_type_and_shape(run: Path, name: str, array: np.ndarray) -> None:
    put_arrays(run / "steps/01" / name, default=array)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        everything(run)


def test_an_archive_may_not_unpack_without_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_arrays(run / "steps/01/confusion.npz", default=np.zeros((1000, 1000), np.int64))
    monkeypatch.setattr(run_folder, "MOST_ARCHIVE", 100)
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        everything(run)


# ---------------------------------------------------------------- the journal


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[1:], "1 line"),
        (lambda lines: lines[:-1], "step 1"),
        (lambda lines: lines[:1], "the steps 0, 1"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "step 1"),
        (None, "is missing"),
    ],
)
def test_a_journal_that_is_not_whole_is_said_in_the_report(
    run: Path, call: Callable[..., tuple[int, str, str]], damage: Any, said: str
) -> None:
    path = run / "journal.jsonl"
    assert Results(RunFolder(run)).journal_faults == ""
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    code, _, err = call("report", run, "--images", 0)
    assert code == 0, err
    text = (run / "report.html").read_text()
    assert "journal.jsonl" in text
    assert said in text


def test_a_folder_that_looks_like_a_step_s_is_none(run: Path) -> None:
    """`"1²".isdigit()` is true and `int` refuses it."""
    before = everything(run)
    shutil.copytree(run / "steps/01", run / "steps/1²")
    shutil.copytree(run / "steps/01", run / f"steps/{'1' * 200}")
    assert everything(run) == before
