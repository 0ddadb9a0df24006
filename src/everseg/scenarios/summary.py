"""Describe what every step will see, before anything is trained, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from everseg.errors import some
from everseg.labels import BACKGROUND, LabelSpace, PolicySet, RawLabels, is_background_name, spelling
from everseg.scenarios.steps import Labelled, Source, Step


def summarise(steps: Sequence[Step], counts: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Describe per step which images and pixels are trained under which label, and what leaks between steps.

    Args:
        counts: (N, 256) pixels per raw id of every image, under "<data set>/<split>" or "<split>".

    Returns:
        One JSON-ready dict per step:
        index; domains: those trained, [] in runs on one data set; branches: name -> {num_old, num_classes} of those
            trained;
        new_classes: classes that outputs are added for;
        train, val, test: numbers of images;
        classes: name -> {images, pixels} of the classes labelled in training (counts before augmentation);
        class_weights: name -> weight in the cross-entropy, {} without;
        background_pixels, ignored_pixels: all training pixels with that label;
        hidden: pixels that carry a class of the scenario but are trained as background or ignored, {old, future}:
            name -> pixels;
        leaks: {shared_images: earlier or later step -> training images in common, images_with_future_classes,
            images_with_old_classes_unlabelled}.
        Where a step trains several domains, class names read "domain: class".
    """
    return [_summary(step, steps, counts) for step in steps]


def _summary(step: Step, steps: Sequence[Step], counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    # `later` and `earlier`: classes that other steps teach and that this step's labels hide, as raw id -> name.
    totals = {"classes": {}, "background": 0, "ignored": 0, "old": {}, "future": {}}  # type: dict[str, Any]
    with_future = with_old = 0
    prefix = _prefixes(step)
    for source in step.train:
        pixels = pixels_of(source, counts)
        later = _hidden(step, steps, source, future=True)
        earlier = _hidden(step, steps, source, future=False)
        with_future += int((pixels[:, list(later)] > 0).any(axis=1).sum())
        with_old += int((pixels[:, list(earlier)] > 0).any(axis=1).sum())
        _add_labels(totals, pixels, source, step, prefix[source.name])
        for kind, ids in (("old", earlier), ("future", later)):
            for raw, name in ids.items():
                key = prefix[source.name] + name
                totals[kind][key] = totals[kind].get(key, 0) + int(pixels[:, raw].sum())
    shared = {
        str(other.index): len(_images(step.train) & _images(other.train))
        for other in steps
        if other is not step
    }
    trained = step.trained_branches
    return {
        "index": step.index,
        "domains": list(dict.fromkeys(source.domain for source in step.train if source.domain)),
        "branches": {
            b: {"num_old": step.num_old(b), "num_classes": step.spaces[b].num_classes} for b in trained
        },
        "new_classes": _new_classes(step),
        **{role: sum(len(s.indices) for s in getattr(step, role)) for role in ("train", "val", "test")},
        "classes": totals["classes"],
        "class_weights": _weights(step),
        "background_pixels": totals["background"],
        "ignored_pixels": totals["ignored"],
        "hidden": {"old": totals["old"], "future": totals["future"]},
        "leaks": {
            "shared_images": {index: number for index, number in shared.items() if number},
            "images_with_future_classes": with_future,
            "images_with_old_classes_unlabelled": with_old,
        },
    }


def _prefixes(step: Step) -> dict[str, str]:
    """Source -> prefix of its class names: its domain where the step trains several, else nothing."""
    names = dict.fromkeys(source.name for source in step.train)
    return {name: f"{name}: " if len(names) > 1 else "" for name in names}


def _new_classes(step: Step) -> list[str]:
    prefix, result = _prefixes(step), dict[str, None]()
    for source in step.train:
        space = step.spaces[source.branch]
        labelled = set(source.lut)
        for train_id in range(step.num_old(source.branch), space.num_classes):
            # Ids below 0 are synthetic outputs (background, void): they are added, but no class is taught by them.
            if train_id != space.background and space.order[train_id] >= 0 and train_id in labelled:
                result[prefix[source.name] + space.names[train_id]] = None
    return list(result)


def _weights(step: Step) -> dict[str, float]:
    prefix, result = _prefixes(step), dict[str, float]()
    for source in step.train:
        weights, names = step.class_weights.get(source.branch, ()), step.spaces[source.branch].names
        result |= {prefix[source.name] + name: weight for name, weight in zip(names, weights, strict=False)}
    return result


def _add_labels(totals: dict[str, Any], pixels: np.ndarray, source: Source, step: Step, prefix: str) -> None:
    space = step.spaces[source.branch]
    for raw, train_id in enumerate(source.lut):
        number = int(pixels[:, raw].sum())
        if train_id == source.ignored:
            totals["ignored"] += number
        elif train_id == space.background:
            totals["background"] += number
        else:
            entry = totals["classes"].setdefault(prefix + space.names[train_id], {"images": 0, "pixels": 0})
            entry["images"] += int((pixels[:, raw] > 0).sum())
            entry["pixels"] += number


def pixels_of(source: Source, counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """(images of the source, raw ids) pixels per raw id."""
    # Runs on one data set may key the counts by the split alone.
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
                # Not a class there, or labelled here with the same train id: nothing is hidden.
                if train_id in (taught.ignored, space.background) or source.lut[raw] == train_id:
                    continue
                hidden[raw] = space.names[train_id]
    return hidden


def _images(sources: Iterable[Source]) -> set[tuple[str, str, int]]:
    return {(source.dataset, source.split, i) for source in sources for i in source.indices}


def naming_notes(
    steps: Sequence[Step], datasets: Mapping[str, Labelled], counts: Mapping[str, np.ndarray]
) -> list[str]:
    """Say what a scenario made of class names that were not as expected.

    That is: a background recognised by another name, a class joined with one that is spelt otherwise, and classes of
    the data that no step teaches, with what their pixels are trained as.

    Args:
        datasets: key of the sources -> data set.
        counts: as for `summarise`.

    Returns:
        Sentences without a full stop.
    """
    notes: list[str] = []
    sources = [(step.spaces[source.branch], source) for step in steps for source in step.train]
    for key, dataset in datasets.items():
        own = [(space, source) for space, source in sources if source.dataset == key]
        if own:
            whose = f"data set '{dataset.name}'" + ("" if key == dataset.name else f" (domain '{key}')")
            notes += [*_joined(dataset.labels, own, whose), *_untaught(dataset.labels, own, counts, whose)]
    return list(dict.fromkeys(notes))


def _joined(labels: RawLabels, own: Sequence[tuple[LabelSpace, Source]], whose: str) -> list[str]:
    """Classes that a branch knows in another spelling, and a background recognised by an unusual name."""
    background = None if labels.background is None else labels.names[labels.background]
    notes = []
    if background is not None and background != BACKGROUND and is_background_name(background):
        notes.append(
            f"class '{background}' of {whose} is taken for its background (background: null denies it)"
        )
    for space, source in own:
        for raw in source.labelled(space):
            name, known = labels.names.get(raw, ""), space.names[source.lut[raw]]
            if name != known and spelling(name) == spelling(known):
                notes.append(
                    f"class '{name}' of {whose} is taken for '{known}', which branch '{source.branch}' knows"
                )
    return notes


def _untaught(
    labels: RawLabels, own: Sequence[tuple[LabelSpace, Source]], counts: Mapping[str, np.ndarray], whose: str
) -> list[str]:
    """Classes of the data that no branch knows: what their pixels are trained as."""
    known = {spelling(name) for space, _ in own for name in (*space.names, *dict(space.formerly))}
    total = np.zeros(labels.width, np.int64)
    for split in dict.fromkeys(source.split for _, source in own):
        parts = [source for _, source in own if source.split == split]
        images = tuple(sorted({index for source in parts for index in source.indices}))
        total += pixels_of(replace(parts[0], indices=images), counts).sum(axis=0, dtype=np.int64)
    fates: dict[str, list[str]] = {}
    for raw in labels.classes:
        if spelling(labels.names[raw]) not in known:
            fate = (
                "ignored"
                if all(source.lut[raw] == source.ignored for _, source in own)
                else "trained as background"
            )
            fates.setdefault(fate, []).append(f"'{labels.names[raw]}' ({total[raw]:,} training pixels)")
    return [f"no step teaches {some(lonely, 12)} of {whose}: {fate}" for fate, lonely in fates.items()]


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
    """Make the content of a run's scenario.json: classes, label policy, image lists by number and digest.

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
                **({"fresh": True} if step.fresh else {}),
                **({"class_weights": dict(step.class_weights)} if step.class_weights else {}),
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
        **({"domain": source.domain} if source.domain else {}),
        "split": source.split,
        "images": len(source.indices),
        "sha256": source.digest,
        "lut": list(source.lut),
    }
