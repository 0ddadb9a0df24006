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
    first = b'{"event": "train", "step": 0, "iteration": 1, "lr": 0.1}\n'
    assert journal.of_step(0) == first + b'{"event": "eval", "step": 0, "iteration": 2}\n'
    journal.rewind(0, 1)
    assert (tmp_path / "journal.jsonl").read_bytes() == first
    assert Journal(tmp_path / "none").of_step(0) == b""
