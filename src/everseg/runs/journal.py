"""The journal: one JSON line per logged iteration and event of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from everseg.data.batches.samples import SampleKey
from everseg.runs.commit import write_bytes, writing


class Journal:
    """Reads and appends lines of `journal.jsonl`. A journal without a file (path None) writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

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
        write_bytes(self.path, b"".join(_line(entry) for entry in kept))

    def lines(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the entries so far, or those of one event. Skip half-written lines and lines without an event."""
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if (
                isinstance(entry, dict)
                and {"event", "step"} <= entry.keys()
                and event in (None, entry["event"])
            ):
                yield entry

    def of_step(self, step: int) -> bytes:
        """Return the lines of one step as bytes, in the form of the file."""
        return b"".join(_line(entry) for entry in self.lines() if entry["step"] == step)

    def add(self, event: str, *, step: int, **values: Any) -> None:
        """Append one line."""
        if self.path is not None:
            with writing(self.path), self.path.open("ab") as file:
                file.write(_line({"event": event, "step": step, **values}))


def _moment(entry: Mapping[str, Any]) -> tuple[int, bool, float, int]:
    """Order the lines of a run: each step's pre-tunings come before its training, its pass without gradients after."""
    tuning = entry.get("tuning")
    when = math.inf if tuning is None else tuning
    return entry["step"], bool(entry.get("pass")), when, entry.get("iteration", 0)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


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
