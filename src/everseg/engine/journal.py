"""The journal: one JSON line per logged iteration and event of a run (floor 5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everseg.engine.checkpoint import write_bytes, writing


class Journal:
    """Appends lines to `journal.jsonl`; a silent one (path None) writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def rewind(self, step: int, iteration: int) -> None:
        """Drop the lines of iterations that will be done again, and half-written ones."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if (entry["step"], entry.get("iteration", 0)) <= (step, iteration):
                kept.append(line)
        write_bytes(self.path, b"".join(line + b"\n" for line in kept))

    def add(self, event: str, *, step: int, **values: Any) -> None:
        """Append one line."""
        if self.path is not None:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
