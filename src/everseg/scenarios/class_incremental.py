"""Class-incremental scenarios: which images and labels each step sees.

The rules are those of Cermelli et al., CVPR 2020 (MiB), section 4, as the authors' code has them: the classes in the
whole mask of an image decide to which steps it belongs; the background never counts. Images stay in the order of the
split.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from everseg.config.fields import ScenarioConfig
from everseg.data.base import Dataset
from everseg.display import counted
from everseg.errors import ConfigError, DataError
from everseg.labels import (
    BACKGROUND,
    SYNTHETIC_BACKGROUND,
    LabelPolicy,
    LabelSpace,
    PolicySet,
    RawLabels,
    policy_set,
)
from everseg.scenarios.combine import arranged, check_settings, cross_validation, holds_out_later
from everseg.scenarios.lists import check_list, check_own_lists, resolve_lists
from everseg.scenarios.step_weights import weighted
from everseg.scenarios.steps import Labelled, Source, Step, Validation, missing_splits, packed
from everseg.scenarios.tasks import Groups, task_groups

PROTOCOLS = ("disjoint", "overlapped", "sequential", "partitioned")
_PARTITION_STREAM = 0x5041
"""Part of the seed of the partitioned protocol, so that no other draw of a run has the same random stream."""


def build(
    config: ScenarioConfig, dataset: Dataset, counts: Mapping[str, np.ndarray], *, seed: int
) -> tuple[Step, ...]:
    """Teach the classes of one data set in steps, as `task`, `order` and `protocol` say.

    Args:
        counts: split -> (N, 256) pixels per raw id of every image, in the order of the split.
        seed: decides only the partitioned protocol and the held-out images.

    Raises:
        ConfigError: a task, class, split or list that does not exist.
        DataError: a step or class without images, or lists that do not fit the data.
    """
    check_settings(
        config,
        (
            config.steps is not None,
            "scenario.steps: steps of domains need data.domains and scenario.kind=domain-incremental; "
            "the classes of each step are scenario.task here",
        ),
        (
            config.void_channel,
            "scenario.void_channel: a void output is for domains without background; "
            "class-incremental label spaces have one",
        ),
    )
    groups = task_groups(config.task, dataset.labels, dataset.name, config.order)
    lists = resolve_lists(config, dataset, len(groups))
    check_own_lists(lists or (), config, dataset, groups, counts["train"])
    steps = class_incremental(
        dataset,
        groups,
        counts,
        protocol=config.protocol,
        policy=config.policy,
        seed=seed,
        lists=lists,
        test_split=config.test_split,
        validation="none" if holds_out_later(config) else config.validation,
        partition_draw=config.partition_draw,
    )
    keyed = {f"{dataset.name}/{split}": table for split, table in counts.items()}
    steps = arranged(config, steps, seed=seed)
    # Weights come last: they belong to the outputs of the steps as arranged.
    return weighted(steps, config.class_weights, {dataset.name: dataset}, keyed)


def class_incremental(
    dataset: Labelled,
    groups: Groups,
    image_classes: Mapping[str, np.ndarray],
    *,
    protocol: str = "overlapped",
    policy: str | PolicySet = "ignore-void",
    seed: int = 0,
    branch: str = "default",
    lists: Sequence[np.ndarray] | None = None,
    train_split: str = "train",
    test_split: str = "val",
    validation: Validation = "none",
    strict: bool = True,
    partition_draw: Literal["everseg", "authors"] = "everseg",
) -> tuple[Step, ...]:
    """Teach groups of classes one after the other.

    Training images of a step, by `protocol`:
        overlapped: at least one pixel of a class taught now.
        disjoint: additionally nothing but classes taught now or before, background and void in the whole mask.
        sequential: as disjoint, and old classes keep their labels (the authors' `--no_mask`).
        partitioned: every image with a class is given to one of its classes at random, so to one step only.
    Validation images always follow the overlapped rule. Test images are those with any class taught so far (as
    the authors do, so their number grows), with all of these classes labelled.

    Args:
        dataset: name and raw labels (a `Dataset`).
        groups: raw ids taught in each step, without background; classes in no group are never taught.
        image_classes: split -> (N, 256) pixels per raw id of every image (only > 0 counts here).
        policy: label convention, a name or a `PolicySet`.
        seed: decides only `partitioned` and "cross".
        branch: branch that grows.
        lists: positions in the training split per step, used instead of the protocol's choice.
        validation: "none", "split" (the data set's own `val` split, labelled with `policy.val`), "cross" (20 % of
            the step's training images, held out, training labels) or "train" (the training images).
        strict: refuse steps without training or test images, and classes that no training image of their step has.
        partition_draw: random numbers of `partitioned`; "authors" = those of MiB-AugM's code (`drawn_owners`).

    Returns:
        One step per group. A data set without background class gets a synthetic background as train id 0.

    Raises:
        ConfigError: unknown protocol, policy or split; ill-formed groups or lists.
        DataError: see `strict`.
    """
    labels = dataset.labels
    policies = policy_set(policy) if isinstance(policy, str) else policy
    _check_arguments(dataset, groups, image_classes, protocol, validation, (train_split, test_split))
    present = {split: np.asarray(counts) > 0 for split, counts in image_classes.items()}
    spaces = _spaces(labels, groups)
    chosen = (
        _train_images(present[train_split], labels, groups, protocol, seed, partition_draw)
        if lists is None
        else _check_lists(lists, len(groups), len(present[train_split]))
    )
    val_split = validation_split(present, test_split)
    steps = []
    for s, space in enumerate(spaces):
        seen = space.order
        # In training only classes taught now keep their labels; `sequential` also keeps those of earlier steps.
        visible = seen if protocol == "sequential" else groups[s]

        def source(
            split: str, indices: np.ndarray, ids: Sequence[int], way: LabelPolicy, space: LabelSpace = space
        ) -> Source:
            lut = packed(space.lut(ids, way, labels.names), space.num_classes)
            return Source(branch, dataset.name, split, tuple(int(i) for i in indices), lut)

        train = source(train_split, chosen[s], visible, policies.train)
        taught = [raw for group in groups[: s + 1] for raw in group]
        test = source(test_split, _having(present[test_split], taught), seen, policies.test)
        val: tuple[Source, ...] = (train,) if validation == "train" else ()
        if validation == "split":
            val = (source(val_split, _having(present[val_split], groups[s]), visible, policies.val),)
        grows = {branch: space.num_classes - (spaces[s - 1].num_classes if s else 0)}
        steps.append(Step(s, (train,), (test,), {branch: space}, grows, val, protocol=protocol))
    if strict:
        _check_images(steps, groups, labels, present[train_split], protocol, lists is not None)
    return cross_validation(tuple(steps), seed=seed) if validation == "cross" else tuple(steps)


def validation_split(splits: Iterable[str], test_split: str) -> str:
    """Return the split for `validation="split"`: the data set's own `val`, or the test split where that is none."""
    return "val" if "val" in splits and test_split != "val" else test_split


def _having(present: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Positions of images with a pixel of any of the ids; (N, 256) bool -> (n,) int64, ascending."""
    return np.flatnonzero(present[:, list(ids)].any(axis=1))


def _train_images(
    present: np.ndarray, labels: RawLabels, groups: Groups, protocol: str, seed: int, draw: str
) -> list[np.ndarray]:
    if protocol == "partitioned":
        owner = (
            _owners(present, groups, seed)
            if draw == "everseg"
            else _owners_of_authors(present, labels.classes, groups, seed)
        )
        return [np.flatnonzero(owner == s) for s in range(len(groups))]
    chosen = [_having(present, group) for group in groups]
    if protocol == "overlapped":
        return chosen
    # Disjoint and sequential: drop images that show anything but classes taught so far, background and void.
    neutral = set(labels.void) | ({labels.background} if labels.background is not None else set())
    for s, indices in enumerate(chosen):
        allowed = neutral.union(*groups[: s + 1])
        foreign = [raw for raw in range(present.shape[1]) if raw not in allowed]
        chosen[s] = indices[~present[indices][:, foreign].any(axis=1)]
    return chosen


def _owners(present: np.ndarray, groups: Groups, seed: int) -> np.ndarray:
    """Draw the step that owns each image: uniformly one of the taught classes it has; -1 without any."""
    step_of = {raw: s for s, group in enumerate(groups) for raw in group}
    taught = np.array(sorted(step_of))
    steps = np.array([step_of[int(raw)] for raw in taught])
    has = present[:, taught]  # (N, taught classes)
    number = has.sum(axis=1)  # (N,)
    # One draw per image, whatever it shows: the owner of an image does not depend on which classes others have.
    draw = np.random.default_rng([seed, _PARTITION_STREAM]).random(len(present))
    rank = np.minimum((draw * number).astype(np.int64), number - 1)
    # Where the (rank + 1)-th class of an image is.
    column = (has.cumsum(axis=1) == rank[:, None] + 1).argmax(axis=1)
    return np.where(number > 0, steps[column], -1)


def _owners_of_authors(
    present: np.ndarray, classes: Collection[int], groups: Groups, seed: int
) -> np.ndarray:
    """Draw the step that owns each image by `drawn_owners`; -1 without a class, or with one that no step teaches."""
    step_of = {raw: s for s, group in enumerate(groups) for raw in group}
    shown = [[raw for raw in np.flatnonzero(row).tolist() if raw in classes] for row in present]
    owners = drawn_owners(shown, seed)
    return np.array([-1 if owner is None else step_of.get(owner, -1) for owner in owners], np.int64)


def drawn_owners(classes: Sequence[Sequence[int]], seed: int) -> list[int | None]:
    """Draw the class that owns each image as MiB-AugM's code does: uniformly one of those that it shows.

    Args:
        classes: ids of the classes that each image shows, without background and void; in any order.
        seed: of numpy's old random stream, which theirs is.

    Returns:
        The class of each image; None for one without classes. An image of one class draws a number, too, as theirs.

    Source: Kwak et al. (MiB-AugM), and its code.

    >>> drawn_owners([[1], [2, 3], []], 0)
    [1, 3, None]
    """
    rng = np.random.RandomState(seed)
    return [sorted(own)[rng.choice(len(own))] if own else None for own in classes]


def _spaces(labels: RawLabels, groups: Groups) -> list[LabelSpace]:
    """Label space known after each step; the background is train id 0."""
    background = SYNTHETIC_BACKGROUND if labels.background is None else labels.background
    names = {**labels.names, background: BACKGROUND}
    full = ((background, *groups[0]), *groups[1:])
    return [
        LabelSpace(
            groups=full[: s + 1],
            names=tuple(names[i] for g in full[: s + 1] for i in g),
            background=0,
        )
        for s in range(len(groups))
    ]


def _check_arguments(
    dataset: Labelled,
    groups: Groups,
    image_classes: Mapping[str, np.ndarray],
    protocol: str,
    validation: str,
    splits: tuple[str, ...],
) -> None:
    problems = []
    if protocol not in PROTOCOLS:
        problems.append(f"scenario.protocol: unknown '{protocol}'; choose one of {', '.join(PROTOCOLS)}")
    if validation not in ("none", "split", "cross", "train"):
        problems.append(f"scenario.validation: unknown '{validation}'; choose none, split, cross or train")
    problems += missing_splits(f"data set '{dataset.name}'", splits, image_classes)
    taught = [raw for group in groups for raw in group]
    if (
        not groups
        or not all(groups)
        or len(set(taught)) < len(taught)
        or not set(taught) <= set(dataset.labels.classes)
    ):
        problems.append(
            "scenario.task: every step needs at least one class of the data set, no class twice, no background"
        )
    if problems:
        raise ConfigError(problems)


def _check_lists(lists: Sequence[np.ndarray], num_steps: int, length: int) -> list[np.ndarray]:
    if len(lists) != num_steps:
        raise ConfigError(
            f"scenario.lists: {counted(len(lists), 'image list')} for {num_steps} steps; give one list per step"
        )
    checked = [np.asarray(indices) for indices in lists]
    problems = [p for s, one in enumerate(checked) for p in check_list(one, length, f"list of step {s}")]
    if problems:
        raise DataError("scenario.lists: " + "; ".join(problems))
    return checked


def _check_images(
    steps: Sequence[Step],
    groups: Groups,
    labels: RawLabels,
    present: np.ndarray,
    protocol: str,
    listed: bool,
) -> None:
    """Raise an error with every step that lacks training or test images, and every class that no image teaches."""
    if listed:
        hint = "; check scenario.lists"
    elif protocol == "partitioned":
        hint = "; the draw gave them to other steps: take another seed, or scenario.protocol=overlapped"
    elif protocol in ("disjoint", "sequential"):
        hint = "; all images with them also have classes of later steps: take scenario.protocol=overlapped"
    else:
        hint = ""
    problems = []
    for step, group in zip(steps, groups, strict=True):
        names = [labels.names[raw] for raw in group]
        where = f"step {step.index} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
        train, test = step.train[0], step.test[0]
        # Two causes with two remedies: no image of the split shows the class, or those that do went to other steps.
        own = present[list(train.indices)]
        absent = [labels.names[raw] for raw in group if not present[:, raw].any()]
        untaught = [labels.names[raw] for raw in group if present[:, raw].any() and not own[:, raw].any()]
        if not train.indices:
            problems.append(
                f"{where}: no image of split '{train.split}' to train on{hint if untaught else ''}"
            )
        if absent:
            problems.append(
                f"{where}: no image of split '{train.split}' has {', '.join(absent)}; check the masks "
                "(everseg data check) or leave the class out of the step (scenario.task, or classes in scenario.steps)"
            )
        if untaught and train.indices:
            problems.append(f"{where}: no training image of this step has {', '.join(untaught)}{hint}")
        if not test.indices:
            problems.append(f"{where}: no image of split '{test.split}' has any class taught so far")
    if problems:
        raise DataError("\n  ".join(["the scenario cannot be taught with these images:", *problems]))
