"""Say what a run's memory keeps: planned, for `everseg show`, and found after each step, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everseg.config.fields import MemoryConfig
from everseg.display import percent, size
from everseg.reports.numbers import Rows
from everseg.runs.results import Results

_LABELS = {
    "as_stored": "the classes annotated when they were stored",
    "seen": "all classes taught so far",
    "current": "the classes of the later step alone",
}


def planned_text(memory: MemoryConfig, batch: int, scenario: Sequence[Mapping[str, Any]]) -> str:
    """Say what the memory will hold and how later steps use it.

    Args:
        batch: images per iteration.
        scenario: what every step will see.
    """
    first = min(memory.size, scenario[0]["train"])
    lines = [
        f"memory: at most {memory.size} images after every step (after the first {first}), chosen by "
        f"'{memory.selection}', labels '{memory.labels}', kept as {memory.keep}"
    ]
    if len(scenario) == 1:
        return lines[0] + "; no later step trains on them, a bundle may hold them (everseg export --memory)"
    return f"{lines[0]}; later steps {_use(memory, batch)}"


def _use(memory: MemoryConfig, batch: int) -> str:
    if memory.mix == "replace":
        return f"take {int(batch * memory.share + 1e-9)} of the {batch} images of every batch from it"
    return "train them like their own, so their epochs are longer by as many images"


def kept_rows(results: Results) -> Rows:
    """Make rows of what every finished step was trained with and keeps; [] for a run without memory."""
    return [
        {
            "step": found.step,
            "trained with": found.before,
            "kept": found.images,
            "with pseudo-labels": found.by_model,
            "copied": found.copied,
            "bytes of copies": found.bytes,
        }
        for found in results.memories
    ]


def kept_text(results: Results) -> list[str]:
    """Say in sentences what a run keeps, and how; [] for a run without memory."""
    memory, kept = results.config.scenario.memory, results.memories
    if not kept:
        return []
    last = kept[-1]
    text = [
        f"After step {last.step} the run keeps {_images(last.images)} of at most {memory.size}, chosen by "
        f"'{memory.selection}'. Later steps {_use(memory, results.config.train.batch)}.",
        f"Their labels in later steps are {_LABELS[memory.labels]} ('{memory.labels}').",
    ]
    if memory.pseudo is not None:
        text.append(
            f"When images are chosen, a class that the {memory.pseudo_network} model sees in the background with a "
            f"score of at least {percent(memory.pseudo)} % counts as shown (pseudo-labels)."
        )
    if last.copied:
        text.append(
            f"The run folder holds copies of {_images(last.copied)} with their labels: {size(last.bytes)} of "
            "training data. They stay when the data set goes."
        )
    if last.images > last.copied:
        rest = last.images - last.copied
        text.append(
            f"{'Of them' if last.copied else 'Of these images'} {rest} {'is' if rest == 1 else 'are'} named only "
            "(references): later steps read them from the data set, which must stay."
        )
    return text


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"
