"""What every step will see, before anything is trained, as plain data (floor 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from everseg.labels import PolicySet
from everseg.scenarios.steps import Source, Step

_IGNORED = 255


def summarise(steps: Sequence[Step], counts: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Tell per step which images and pixels are trained under which label, and what leaks between steps.

    Args:
        counts: (N, 256) pixels per raw id of every image, under "<data set>/<split>" or "<split>".

    Returns:
        One JSON-ready dict per step:
        index, branch, new_classes;
        train, val, test: numbers of images;
        classes: name -> {images, pixels} of the classes labelled in training (counts before augmentation);
        background_pixels, ignored_pixels: all training pixels with that label;
        hidden: pixels that carry a class of the scenario but are trained as background, {old, future}: name -> pixels;
        leaks: {shared_images: earlier or later step -> training images in common, images_with_future_classes,
            images_with_old_classes_unlabelled}.
    """
    return [_summary(step, steps, counts) for step in steps]


def _summary(step: Step, steps: Sequence[Step], counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    branch = step.branch
    space = step.spaces[branch]
    totals = {"classes": {}, "background": 0, "ignored": 0, "old": {}, "future": {}}  # type: dict[str, Any]
    with_future = with_old = 0
    for source in step.train:
        pixels = _pixels(source, counts)
        later = _hidden(step, steps, source, future=True)
        earlier = _hidden(step, steps, source, future=False)
        with_future += int((pixels[:, list(later)] > 0).any(axis=1).sum())
        with_old += int((pixels[:, list(earlier)] > 0).any(axis=1).sum())
        _add_labels(totals, pixels, source, step)
        for kind, ids in (("old", earlier), ("future", later)):
            for raw, name in ids.items():
                totals[kind][name] = totals[kind].get(name, 0) + int(pixels[:, raw].sum())
    shared = {
        str(other.index): len(_images(step.train) & _images(other.train))
        for other in steps
        if other is not step
    }
    gained = {b: s.names[step.num_old(b) :] for b, s in step.spaces.items() if step.grows.get(b)}
    new = [n for b, names in gained.items() for n in names if n != _background(step, b)]
    return {
        "index": step.index,
        "branch": branch,
        "num_old": step.num_old(branch),
        "num_classes": space.num_classes,
        "new_classes": new,
        **{role: sum(len(s.indices) for s in getattr(step, role)) for role in ("train", "val", "test")},
        "classes": totals["classes"],
        "background_pixels": totals["background"],
        "ignored_pixels": totals["ignored"],
        "hidden": {"old": totals["old"], "future": totals["future"]},
        "leaks": {
            "shared_images": {index: number for index, number in shared.items() if number},
            "images_with_future_classes": with_future,
            "images_with_old_classes_unlabelled": with_old,
        },
    }


def _background(step: Step, branch: str) -> str | None:
    space = step.spaces[branch]
    return None if space.background is None else space.names[space.background]


def _add_labels(totals: dict[str, Any], pixels: np.ndarray, source: Source, step: Step) -> None:
    space = step.spaces[source.branch]
    for raw, train_id in enumerate(source.lut):
        number = int(pixels[:, raw].sum())
        if train_id == _IGNORED:
            totals["ignored"] += number
        elif train_id == space.background:
            totals["background"] += number
        else:
            entry = totals["classes"].setdefault(space.names[train_id], {"images": 0, "pixels": 0})
            entry["images"] += int((pixels[:, raw] > 0).sum())
            entry["pixels"] += number


def _pixels(source: Source, counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """(images of the source, 256) pixels per raw id."""
    full = counts.get(f"{source.dataset}/{source.split}")
    table = counts[source.split] if full is None else full
    return np.asarray(table)[list(source.indices)]


def _hidden(step: Step, steps: Sequence[Step], source: Source, *, future: bool) -> dict[int, str]:
    """Raw id -> name of classes that another step teaches from this data set and that are unlabelled here."""
    position = steps.index(step)
    others = steps[position + 1 :] if future else steps[:position]
    hidden = {}
    for other in others:
        for taught in other.train:
            if (taught.branch, taught.dataset) != (source.branch, source.dataset):
                continue
            space = other.spaces[taught.branch]
            for raw, train_id in enumerate(taught.lut):
                if train_id in (_IGNORED, space.background) or source.lut[raw] == train_id:
                    continue
                hidden[raw] = space.names[train_id]
    return hidden


def _images(sources: Iterable[Source]) -> set[tuple[str, str, int]]:
    return {(source.dataset, source.split, i) for source in sources for i in source.indices}


def digests(steps: Sequence[Step]) -> list[dict[str, list[str]]]:
    """SHA-256 of every image list with its label table, per step and role."""
    return [
        {
            "train": [s.digest for s in step.train],
            "val": [s.digest for s in step.val],
            "test": [s.digest for s in step.test],
        }
        for step in steps
    ]


def scenario_json(
    steps: Sequence[Step], policy: PolicySet | None = None, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a run's scenario.json holds: classes, label policy, image lists by number and digest.

    Args:
        policy: the label convention the tables were made with.
        settings: the scenario's own configuration, copied in as it is.
    """
    return {
        "format": 1,
        "settings": dict(settings or {}),
        "policy": None if policy is None else asdict(policy),
        "steps": [
            {
                "index": step.index,
                "branches": {
                    branch: {
                        "classes": list(space.names),
                        "groups": [list(group) for group in space.groups],
                        "background": space.background,
                        "num_old": step.num_old(branch),
                    }
                    for branch, space in step.spaces.items()
                },
                "grows": dict(step.grows),
                **{
                    role: [_source_json(source) for source in getattr(step, role)]
                    for role in ("train", "val", "test")
                },
            }
            for step in steps
        ],
    }


def _source_json(source: Source) -> dict[str, Any]:
    return {
        "branch": source.branch,
        "dataset": source.dataset,
        "split": source.split,
        "images": len(source.indices),
        "sha256": source.digest,
        "lut": list(source.lut),
    }
