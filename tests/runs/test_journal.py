"""The journal: what is read back of lines that a kill, or somebody else, has left."""

from __future__ import annotations

from pathlib import Path

from everseg.runs.journal import Journal


def test_lines_of_no_event_are_passed_over_and_dropped_by_a_rewind(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add("train", step=0, iteration=1, lr=0.1)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"step": 0}\n[]\n{"event": "train"}\n{"event": "tr\n')
    journal.add("eval", step=0, iteration=2)
    journal.add("train", step=1, iteration=1)
    assert [(e["event"], e["step"]) for e in journal.lines()] == [("train", 0), ("eval", 0), ("train", 1)]
    assert [e["iteration"] for e in journal.lines("train")] == [1, 1]
    copy = Journal(tmp_path / "copy")
    (tmp_path / "copy").write_bytes(journal.of_step(0))
    assert copy.read() == ([entry for entry in journal.lines() if entry["step"] == 0], 0)
    journal.rewind(0, 1)
    assert journal.read() == ([{"event": "train", "step": 0, "iteration": 1, "lr": 0.1}], 0)
    journal.add("test", step=0)
    assert Journal(tmp_path / "journal.jsonl").read()[1] == 0
    assert Journal(tmp_path / "none").of_step(0) == b""


def test_lines_that_are_missing_cut_or_changed_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for iteration in range(1, 6):
        Journal(path).add("train", step=0, iteration=iteration)  # each time as a process of its own
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged, lost, kept in (
        (lines[:2] + lines[4:], 2, [1, 2, 5]),
        ([*lines[:4], lines[4][:-9]], 1, [1, 2, 3, 4]),
        ([*lines[:3], lines[3].replace(b'"iteration": 4', b'"iteration": 9'), lines[4]], 1, [1, 2, 3, 5]),
        ([*lines[:3], lines[3].replace(b"check", b"chuck"), lines[4]], 1, [1, 2, 3, 5]),
    ):
        path.write_bytes(b"".join(damaged))
        found, count = Journal(path).read()
        assert ([entry["iteration"] for entry in found], count) == (kept, lost)


def test_a_journal_of_an_earlier_version_goes_on_with_checked_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "train", "step": 0, "iteration": 1}\n{"event": "test", "step": 0}\n')
    Journal(path).add("train", step=1, iteration=1)
    assert [len(found) if isinstance(found, list) else found for found in Journal(path).read()] == [3, 0]


def test_every_flipped_bit_of_a_line_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for iteration in (1, 2, 3):
        Journal(path).add("train", step=0, iteration=iteration, lr=0.05, terms={"ce": 1.25})
    whole, entries = path.read_bytes(), Journal(path).read()[0]
    start, end = whole.index(b"\n") + 1, whole.rindex(b"\n", 0, -1)
    for bit in range(8 * start, 8 * end):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found, lost = Journal(path).read()
        assert lost or found == entries, bit
