"""The documents of run folders and bundles: what stands in each of them (`everseg.runs.shapes`)."""

from __future__ import annotations

from typing import Any

from everseg.runs.commit import is_file_name
from everseg.runs.shapes import (
    COUNT,
    FLAG,
    NUMBER,
    SHA256,
    TEXT,
    WHOLE,
    entries,
    many,
    named,
    one,
    or_none,
)

MOST_THREADS = 4096
THREADS = one(
    f"a whole number from 1 to {MOST_THREADS}",
    lambda value: type(value) is int and 1 <= value <= MOST_THREADS,
)

RUN = entries(
    {
        "config": lambda value, key, problems: None,
        "threads": THREADS,
    },  # the configuration has a reader of its own
    {
        "hash": or_none(TEXT),
        "machine": or_none(TEXT),
        "host": or_none(TEXT),
        "argv": or_none(many(TEXT)),
        "versions": or_none(named(TEXT)),
    },
)
"""run.json."""

_SOURCE = entries(
    {"dataset": TEXT, "split": TEXT, "images": COUNT, "sha256": TEXT, "lut": many(COUNT), "branch": TEXT},
    {"domain": or_none(TEXT)},
)
_SPACE = entries(
    {"classes": many(TEXT), "groups": many(many(WHOLE)), "background": or_none(COUNT), "num_old": COUNT}
)
_STEP = entries(
    {"index": COUNT, "branches": named(_SPACE), "train": many(_SOURCE), "test": many(_SOURCE)},
    {
        "val": many(_SOURCE),
        "grows": named(COUNT),
        "fresh": FLAG,
        "class_weights": named(many(NUMBER)),
    },
)


def _steps(value: Any, key: str, problems: list[str]) -> None:
    many(_STEP)(value, key, problems)
    first = value[0]["index"] if value and not problems else 0  # an extended model goes on counting
    if not problems and [step["index"] for step in value] != list(range(first, first + len(value))):
        problems.append(f"{key}: expected steps numbered in order")


SCENARIO = entries({"steps": _steps}, {"notes": many(TEXT)})
"""scenario.json."""

_MEAN = entries({group: or_none(NUMBER) for group in ("all", "base", "old", "new")})
_THREE = entries({name: or_none(NUMBER) for name in ("mean", "median", "lowest")})
_EACH = entries({name: many(or_none(NUMBER)) for name in ("mean", "median", "lowest")})
_PER_IMAGE = entries(
    {
        "images": COUNT,
        "iou": _THREE,
        "dice": _THREE,
        "class_iou": _EACH,
        "class_dice": _EACH,
        "class_images": many(COUNT),
        "class_false_alarms": many(COUNT),
        "worst": many(entries({"image": TEXT, "iou": NUMBER, "dice": NUMBER})),
    }
)
_SCORES = entries(
    {"miou": _MEAN, "classes": many(TEXT), "new_classes": many(TEXT), "class_iou": many(or_none(NUMBER))},
    {
        "miou_without_background": _MEAN,
        "overall_accuracy": or_none(NUMBER),
        "mean_accuracy": or_none(NUMBER),
        "frequency_weighted_iou": or_none(NUMBER),
        "harmonic_mean": or_none(NUMBER),
        "class_accuracy": many(or_none(NUMBER)),
        "dice": _MEAN,
        "dice_without_background": _MEAN,
        "class_dice": many(or_none(NUMBER)),
        "boundary_iou": _MEAN,
        "boundary_iou_without_background": _MEAN,
        "class_boundary_iou": many(or_none(NUMBER)),
        "per_image": _PER_IMAGE,
        "branch": TEXT,
    },
)


def _scores(value: Any, key: str, problems: list[str]) -> None:
    before = len(problems)
    _SCORES(value, key, problems)
    if len(problems) == before and len(value["classes"]) != len(value["class_iou"]):
        problems.append(f"{key}.class_iou: expected a number for each class")


METRICS = entries(
    {"branches": named(_scores)}, {"step": COUNT, "validation": named(_scores), "files": named(SHA256)}
)
"""metrics.json."""

_ANY_NUMBER = one("a number", lambda value: type(value) in (int, float))
"""A diverged loss is logged as it is."""
LINE = entries(
    {"event": TEXT, "step": COUNT},
    {
        "iteration": COUNT,
        "tuning": or_none(COUNT),
        "images": COUNT,
        "images_per_second": _ANY_NUMBER,
        "memory": or_none(_ANY_NUMBER),
        "lr": or_none(_ANY_NUMBER),
        "grad_norm": or_none(_ANY_NUMBER),
        "terms": or_none(named(or_none(_ANY_NUMBER))),
    },
)
"""A line of journal.jsonl."""

SWEEP = entries({"runs": many(entries({"name": TEXT}))}, {"threads": or_none(THREADS)})
"""sweep.json."""

_IMAGES = entries({"data": TEXT, "images": COUNT, "sha256": TEXT})
_OLD_ON_NEW = entries({"pixels": COUNT})
_STEP_MEAN = entries({"all": or_none(NUMBER)}, {group: or_none(NUMBER) for group in ("base", "old", "new")})
_STEP_SCORES = entries(
    {"miou": _STEP_MEAN, "class_iou": named(or_none(NUMBER))},
    {"miou_without_background": _STEP_MEAN, "old": or_none(many(_OLD_ON_NEW))},
)
_KEPT = entries({}, {"share": or_none(NUMBER), "how": TEXT})


def _kept(value: Any, key: str, problems: list[str]) -> None:
    """Check what an extension kept of the old classes; {} where it was not compared with its bundle."""
    _KEPT(value, key, problems)
    if value and not problems and not {"share", "how"} <= set(value):
        problems.append(f"{key}: expected share and how")


_CHANGED = entries({"drop": many(TEXT), "merge": named(many(TEXT)), "rename": named(TEXT)})
"""Classes that a step without training dropped, merged and renamed."""
_PARITY = entries(
    {"source": TEXT, "sizes": many(many(COUNT)), "logit_difference": NUMBER, "equal_pixels": NUMBER},
    {"one_size": FLAG},
)
_REDUCED = entries(
    {
        "file": TEXT,
        "bytes": COUNT,
        "full_bytes": COUNT,
        "images": COUNT,
        "source": TEXT,
        "calibrated_on": TEXT,
        "measure": TEXT,
        "full": NUMBER,
        "reduced": NUMBER,
        "equal_pixels": NUMBER,
        "classes": named(many(or_none(NUMBER))),
    }
)
LINEAGE = entries(
    {
        "steps": one("the number of steps", lambda value: type(value) is int and 0 <= value < 2**31),
        "parent": or_none(SHA256),
        "history": many(
            entries(
                {
                    "step": COUNT,
                    "method": TEXT,
                    "classes": many(TEXT),
                    "train": many(_IMAGES),
                    "test": many(_IMAGES),
                    "scores": named(_STEP_SCORES),
                },
                {"run": TEXT, "extends": or_none(SHA256), "kept": or_none(_kept), "changed": _CHANGED},
            )
        ),
    },
    {
        "parity": named(_PARITY),
        "reduced": named(named(_REDUCED)),
        "final": or_none(TEXT),
        "method": or_none(TEXT),
        "source": or_none(TEXT),
    },
)
"""lineage.json of a bundle."""

SIGNATURE = entries({"format": COUNT, "signatures": many(entries({"key": SHA256, "signature": TEXT}))})
"""SIGNATURE.json of a bundle."""

_GROUP = entries({"params": many(TEXT)})
STATE = entries(
    {"iteration": COUNT, "total": COUNT, "processes": COUNT},
    {
        "scaler": or_none(named(_ANY_NUMBER)),
        "optimizer": entries(
            {
                "class": TEXT,
                "groups": many(_GROUP),
                "scalars": named(
                    named(or_none(one("a plain value", lambda value: type(value) in (int, float, bool, str))))
                ),
            }
        ),
    },
)
"""state.json of a checkpoint."""

FILE_NAME = one("the name of a file beside it", is_file_name)
DRIFT = entries(
    {
        "before": COUNT,
        "after": COUNT,
        "pictures": many(FILE_NAME),
        "classes": many(
            entries(
                {
                    "domain": TEXT,
                    "class_name": TEXT,
                    "pixels": COUNT,
                    "relative": or_none(NUMBER),
                    "accuracy_before": NUMBER,
                    "accuracy_after": NUMBER,
                }
            )
        ),
    }
)
"""drift.json of `everseg features`."""
