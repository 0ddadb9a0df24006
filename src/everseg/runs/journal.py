"""The journal: one JSON line per logged iteration and event of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from everseg.data.batches.samples import SampleKey
from everseg.errors import CheckpointError
from everseg.files import MB, UnreadableError, json_of, read_regular
from everseg.runs.commit import canonical_hash, write_bytes, writing
from everseg.runs.documents import LINE
from everseg.runs.shapes import problems_of

FILE = "journal.jsonl"
MOST = 1024 * MB
"""Bytes of a journal."""
NUMBER, CHECK = "n", "check"
"""Entries of a line that tell whether lines are missing (its number in the file, from 0) or changed (its checksum)."""


class Journal:
    """Reads and appends lines of `journal.jsonl`. A journal without a file (path None) writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._next: int | None = None  # number of the next line; None = the file has not been looked at

    def rewind(self, step: int, iteration: int, tuning: int | None = None, *, passing: bool = False) -> None:
        """Drop the lines of iterations that will be done again, and half-written lines.

        Args:
            step: the step that continues.
            iteration: the iteration from which it continues; lines up to and including it stay.
            tuning: number of the pre-tuning to which the iteration belongs; None = it is one of the training.
            passing: it is a batch of the pass without gradients, which comes after the training.
        """
        if self.path is None or not self.path.exists():
            return
        last = _moment({"step": step, "iteration": iteration, "tuning": tuning, "pass": passing})
        kept = [entry for entry in self.lines() if _moment(entry) <= last]
        write_bytes(self.path, _lines(kept))
        self._next = len(kept)

    def lines(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the entries so far, or those of one event. Lines that are half-written or changed are left out.

        Raises:
            CheckpointError: the file cannot be read.
        """
        for entry in self.read()[0]:
            if event in (None, entry["event"]):
                yield entry

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """Read the entries, and count the lines that are missing, half-written or changed.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if self.path is None or not self.path.exists():
            return [], 0
        try:
            data = read_regular(self.path, MOST, root=self.path.parent)
        except UnreadableError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error}); move it away to go on without the curves of training"
            ) from None
        entries: list[dict[str, Any]] = []
        lost, checked, number = 0, False, 0
        for line in data.splitlines():
            entry = _entry(line)
            # Runs of 0.1.0 wrote lines without checksum. Once a line has one, all later ones do.
            if entry is None or (checked and CHECK not in entry):
                lost, number = lost + 1, number + 1
                continue
            if CHECK in entry:
                checked = True
                lost += max(0, entry[NUMBER] - number)
                number = entry[NUMBER]
            number += 1
            entries.append({key: value for key, value in entry.items() if key not in (NUMBER, CHECK)})
        return entries, lost

    def of_step(self, step: int) -> bytes:
        """Return the lines of one step as bytes, in the form of the file."""
        return _lines(entry for entry in self.lines() if entry["step"] == step)

    def add(self, event: str, *, step: int, **values: Any) -> None:
        """Append one line."""
        if self.path is None:
            return
        if self._next is None:
            entries, lost = self.read()
            self._next = len(entries) + lost
        with writing(self.path), self.path.open("ab") as file:
            file.write(_line({"event": event, "step": step, **values}, self._next))
        self._next += 1


def _entry(line: bytes) -> dict[str, Any] | None:
    """Read a line; None if it is no entry, or does not match its checksum."""
    try:
        entry = json_of(line)
    except UnreadableError:
        return None
    if problems_of(entry, LINE):
        return None
    if CHECK in entry:
        body = {key: value for key, value in entry.items() if key != CHECK}
        if type(entry.get(NUMBER)) is not int or entry[CHECK] != _check(body):
            return None
    return entry


def _moment(entry: Mapping[str, Any]) -> tuple[int, bool, float, int]:
    """Order the lines of a run: each step's pre-tunings come before its training, its pass without gradients after."""
    tuning = entry.get("tuning")
    when = math.inf if tuning is None else tuning
    return entry["step"], bool(entry.get("pass")), when, entry.get("iteration", 0)


def _line(entry: Mapping[str, Any], number: int) -> bytes:
    body = {**entry, NUMBER: number}
    return json.dumps({**body, CHECK: _check(body)}).encode() + b"\n"


def _lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(_line(entry, number) for number, entry in enumerate(entries))


def _check(body: Mapping[str, Any]) -> str:
    return canonical_hash(body)[:16]


EVENT = "bad_sample"


def replaced_samples(entries: Iterable[Mapping[str, Any]], step: int | None = None) -> dict[SampleKey, str]:
    """Collect the distinct training samples that a run, or one of its steps, replaced, each with the reason.

    Args:
        entries: the entries of the journal.
    """
    return {
        (str(line.get("dataset", "")), str(line.get("sample", ""))): str(line.get("reason", ""))
        for line in entries
        if line["event"] == EVENT and step in (None, line.get("step"))
    }
