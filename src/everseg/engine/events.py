"""The numbers of a run under their tags, for TensorBoard and other trackers; the journal stays the record of a run."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from everseg.display import counted, percent
from everseg.errors import first_line
from everseg.inference.pictures import confusion_picture, legend, shrink, triplet

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Image (H, W, 3) uint8, label ids (H, W), predicted ids (H, W)."""

_PICTURE_HEIGHT = 512
_PICTURE_WIDTH = 1536
_LONGEST_TAG = 80
_SHORT_TAGS = {"backward_transfer": "bwt", "average_miou": "avg_miou"}


class Sink(Protocol):
    """A place that keeps the numbers of a run."""

    name: str
    """As the user knows it."""
    errors: tuple[type[Exception], ...]
    """What `write` may raise when the place cannot be written any more."""

    def write(self, iteration: int, record: Record) -> None:
        """Keep what belongs to an iteration."""

    def close(self) -> None:
        """Close the place; it is not used again."""


@dataclass(frozen=True)
class Record:
    """What is written for one iteration."""

    values: Mapping[str, float]
    """Tag -> number, NaN where a loss diverged."""
    pictures: Mapping[str, np.ndarray]
    """Tag -> (H, W, 3) uint8."""
    texts: Mapping[str, str]
    """Tag -> Markdown."""


class Events:
    """Gives a run's numbers their tags and hands them to the places that the user chose (`tracker`).

    A place that fails is closed with one note, and training goes on without it: the journal is the record of a run.

    Args:
        sinks: the places; none (another rank than 0) writes nothing.
        notify: called with the note that says why a place gets nothing more.
    """

    def __init__(self, sinks: Sequence[Sink] = (), *, notify: Callable[[str], None] | None = None) -> None:
        self._notify = notify
        self._sinks = list(sinks)
        self._legends: dict[str, tuple[str, ...]] = {}

    @property
    def active(self) -> bool:
        """Whether anything is written; where not, the caller need not make samples."""
        return bool(self._sinks)

    def scalars(
        self,
        iteration: int,
        terms: Mapping[str, float],
        *,
        lr: float | Mapping[str, float],
        images_per_second: float,
        data_wait: float | None = None,
        grad_norm: float | None = None,
        memory: float | None = None,
        gpu_memory: float | None = None,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Write the numbers of one training iteration.

        Args:
            iteration: iterations done, counted over all steps.
            terms: loss term -> value, weight applied: `train/loss/<term>`, and their sum `train/loss`.
            lr: learning rate, `train/lr`, or one for each group, `train/lr/<group>`.
            images_per_second: `sys/img_s`, over all processes.
            data_wait: share of the time spent waiting for the loader, `sys/data_wait`.
            grad_norm: `train/grad_norm`.
            memory: memory of this process in bytes, `sys/mem` in GiB.
            gpu_memory: memory on the GPU in bytes, `sys/gpu_mem` in GiB.
            extra: what a method measures, `train/<name>`.
        """
        if not self.active:
            return
        values: dict[str, float | None] = {
            "train/loss": math.fsum(terms.values()) if _finite(terms) else math.nan
        }
        values |= _tagged("train/loss", terms)
        values |= _tagged("train/lr", lr) if isinstance(lr, Mapping) else {"train/lr": lr}
        values |= {"train/grad_norm": grad_norm, "sys/img_s": images_per_second, "sys/data_wait": data_wait}
        values |= {"sys/mem": _gibibytes(memory), "sys/gpu_mem": _gibibytes(gpu_memory)}
        values |= _tagged("train", extra or {})
        self._write(iteration, values)

    def measured(
        self,
        iteration: int,
        values: Mapping[str, float],
        *,
        images_per_second: float,
        data_wait: float | None = None,
        memory: float | None = None,
    ) -> None:
        """Write the numbers of a batch that trains nothing: `pass/<name>`, and those of the machine as in `scalars`."""
        if self.active:
            machine = {"img_s": images_per_second, "data_wait": data_wait, "mem": _gibibytes(memory)}
            self._write(iteration, {**_tagged("pass", values), **_tagged("sys", machine)})

    def evaluation(
        self,
        iteration: int,
        step: int,
        class_names: Sequence[str],
        scores: Mapping[str, Any],
        counts: np.ndarray,
        samples: Sequence[Sample] = (),
        *,
        background: int | None,
        domain: str | None = None,
    ) -> None:
        """Write one evaluation: groups of scores, IoU of each class, a table, the confusion matrix, pictures.

        Absent scores (None or NaN: a class without pixels, a group without classes) are left out of the curves.

        Args:
            iteration: iterations done, counted over all steps.
            step: the scenario's step, from 0.
            class_names: C names in the order of the ids.
            scores: as `everseg.metrics.step_scores`, fractions of 1. A number becomes `val/<name>`, a group
                `val/<name>/<member>`; "class_iou" (C numbers) `val/iou/<class>`; every "class_..." is a column of
                the table `val/classes`. Other lists and texts are not written.
            counts: (C, C) pixels, row = label, column = prediction; picture `val/confusion`.
            samples: pictures `val/pred/<k>`: image | label | prediction.
            background: id of the background, None if there is none.
            domain: where there are several, its name; `val/<domain>/` then takes the place of `val/`.

        Raises:
            ValueError: lengths or sizes do not fit together.
        """
        if not self.active:
            return
        root = "val" if domain is None else f"val/{safe_tag(domain)}"
        columns = {
            name: _column(name, scores[name], len(class_names))
            for name in scores
            if name.startswith("class_")
        }
        values: dict[str, float | None] = {}
        for name, value in scores.items():
            if isinstance(value, Mapping):
                values |= _tagged(f"{root}/{safe_tag(name)}", _numbers(value))
            elif isinstance(value, (int, float, np.number)):
                values[f"{root}/{safe_tag(name)}"] = float(value)
        # Classes may have names that are no tags, or equal ones once they are made tags: `safe_tags` keeps them apart.
        if "class_iou" in columns:
            tags = (f"{root}/iou/{tag}" for tag in safe_tags(class_names))
            values |= dict(zip(tags, columns["class_iou"], strict=True))
        pictures = {f"{root}/confusion": confusion_picture(counts, class_names)}
        # The legend is written again only when classes have been added.
        if self._legends.get(root) != tuple(class_names):
            pictures[f"{root}/legend"] = legend(class_names, background=background)
            self._legends[root] = tuple(class_names)
        for k, sample in enumerate(samples):
            side_by_side = triplet(*sample, background=background)
            pictures[f"{root}/pred/{k}"] = shrink(side_by_side, _PICTURE_HEIGHT, _PICTURE_WIDTH)
        table = _table(class_names, columns, np.asarray(counts).sum(axis=1))
        text = f"Step {step}, iteration {iteration}\n\n{table}"
        self._write(iteration, _present(values), pictures, {f"{root}/classes": text})

    def sequence(self, iteration: int, scores: Mapping[str, Any]) -> None:
        """Write scores of the sequence so far: `cl/forgetting`, `cl/bwt`, `cl/avg_miou`.

        Args:
            iteration: iterations done, counted over all steps.
            scores: name -> number (absent: None or NaN), or name -> group of numbers (`cl/<name>/<member>`).
                "backward_transfer" is written as `bwt`, "average_miou" as `avg_miou`. Lists are not written.
        """
        if not self.active:
            return
        values: dict[str, float | None] = {}
        for name, value in scores.items():
            tag = f"cl/{safe_tag(_SHORT_TAGS.get(name, name))}"
            values |= _tagged(tag, _numbers(value)) if isinstance(value, Mapping) else _numbers({tag: value})
        self._write(iteration, _present(values))

    def close(self) -> None:
        """Close all places; a second call does nothing."""
        while self._sinks:
            self._end(self._sinks[0])

    def _end(self, sink: Sink) -> None:
        self._sinks.remove(sink)
        with contextlib.suppress(*sink.errors):  # what was written was flushed, and its error reported then
            sink.close()

    def _write(
        self,
        iteration: int,
        values: Mapping[str, float | None],
        pictures: Mapping[str, np.ndarray] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write tag -> value (None: absent); an error of a place ends that place, not the run."""
        record = Record(
            {tag: value for tag, value in values.items() if value is not None}, pictures or {}, texts or {}
        )
        for sink in list(self._sinks):
            try:
                sink.write(iteration, record)
            except sink.errors as error:
                self._end(sink)
                if self._notify is not None:
                    self._notify(
                        f"{sink.name} stops here: it cannot be written ({_reason(error)}); training and journal go on"
                    )


def _reason(error: Exception) -> str:
    return (
        (error.strerror if isinstance(error, OSError) else None) or first_line(error) or type(error).__name__
    )


def _present(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {tag: value for tag, value in values.items() if value is not None and not math.isnan(value)}


def safe_tag(name: str) -> str:
    """Make one part of a tag from any text: letters of all scripts, digits, `_ . -` and blanks, at most 80."""
    clean = re.sub(r"[^\w.\- ]+", "_", name)
    clean = " ".join(clean.split()).strip(" .")[:_LONGEST_TAG].strip(" .")
    return clean or "_"


def safe_tags(names: Sequence[str]) -> list[str]:
    """Make distinct safe tags; where two names give the same tag, the later one gets its number in the list."""
    tags: list[str] = []
    for index, name in enumerate(names):
        tag = safe_tag(name)
        # The numbered tag may be taken as well (a class called "road_1"): underscores are added until it is free.
        number = str(index)
        while tag in tags:
            tag = f"{safe_tag(name)}_{number}"
            number += "_"
        tags.append(tag)
    return tags


def _tagged(prefix: str, values: Mapping[str, Any]) -> dict[str, float | None]:
    tags = safe_tags(list(values))
    return {f"{prefix}/{tag}": value for tag, value in zip(tags, values.values(), strict=True)}


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The single numbers among scores; lists stay in the files they come from."""
    keep = {name: v for name, v in values.items() if v is None or isinstance(v, (int, float, np.number))}
    return {name: None if v is None else float(v) for name, v in keep.items()}


def _finite(terms: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in terms.values())


def _gibibytes(count: float | None) -> float | None:
    return None if count is None else count / 2**30


def _column(name: str, values: Sequence[float | None], count: int) -> list[float | None]:
    column = [None if value is None else float(value) for value in values]
    if len(column) != count:
        raise ValueError(f"{name} has {counted(len(column), 'entry')} for {count} class names")
    return column


def _table(
    class_names: Sequence[str], columns: Mapping[str, Sequence[float | None]], label_pixels: np.ndarray
) -> str:
    heads = [
        "id",
        "class",
        *(name.removeprefix("class_").replace("_", " ") for name in columns),
        "label pixels",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---:|:---|" + "---:|" * (len(columns) + 1)]
    for index, name in enumerate(class_names):
        numbers = [percent(column[index], digits=2) for column in columns.values()]
        lines.append(
            "| " + " | ".join([str(index), _escape(name), *numbers, str(int(label_pixels[index]))]) + " |"
        )
    return "\n".join(lines)


def _escape(name: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    printable = "".join(letter if letter.isprintable() else " " for letter in name)
    return re.sub(
        r"[^\w \-.,:;/()+]|_", lambda found: f"&#{ord(found.group())};", " ".join(printable.split())
    )
