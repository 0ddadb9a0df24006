"""New classes, or more images of known ones, for the model of a bundle; its old classes need no labels.

An extension is no benchmark: it trains and tests on every image of its splits. The benchmarks' rule (images that show a
class of the step) would hide what the model says in images without a new class, and would not train against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from everseg.config.fields import ScenarioConfig
from everseg.data.base import Dataset
from everseg.errors import ConfigError, DataError, near_miss, some
from everseg.labels import LabelPolicy, LabelSpace, PolicySet, find_name, policy_set, shared_classes, spelling
from everseg.scenarios.combine import check_settings
from everseg.scenarios.steps import Source, Step, packed


def build(
    config: ScenarioConfig,
    dataset: Dataset,
    counts: Mapping[str, np.ndarray],
    *,
    seed: int,
    read: Callable[[Path], Known],
) -> tuple[Step, ...]:
    """Teach new classes to the model of a bundle, or refine it on more images of its own, in one step.

    Its index is the number of steps that the bundle's model has been trained in. Every image of the training split is
    trained and every image of the test split is tested, also those without a new class. Classes are matched by name
    (`everseg.labels.spelling`): with the protocol "sequential" classes of the bundle keep their labels where the data
    have them, with "overlapped" they are trained as the label policy says of old ones; all other pixels are background,
    which is "an old class or nothing" to methods such as MiB. Where the model has no background they are ignored. The
    test is that of `tested`.

    The images take the branch `branch`. Where the bundle does not know it, it is new and begins as a copy of the branch
    `like` (`everseg.runs.model_edits.with_branch`), so all classes of that one are old classes of it.

    Args:
        config: `bundle`, and `task` with one list: the names of the new classes; [] or [[]] for none.
        counts: split -> (N, 256) pixels per raw id of every image.
        seed: not used; nothing is drawn.
        read: what gives the classes that a bundle's model knows; may raise a CheckpointError.

    Raises:
        ConfigError: no bundle; a class that the data do not have or the branch knows already; no branch, or an unknown
            one.
        DataError: no training image has a new class; without new classes: the data label no class of the bundle.
    """
    check_settings(
        config,
        (config.bundle is None, "scenario.bundle: an extension starts from a bundle; name its folder"),
        (
            not isinstance(config.task, list) or len(config.task) > 1,
            "scenario.task: an extension has one step; name its classes: [[forklift, person]], or [] for none",
        ),
        (
            config.protocol not in ("overlapped", "sequential"),
            f"scenario.protocol: an extension takes overlapped or sequential, not {config.protocol}",
        ),
        *(
            (bool(value), f"scenario.{key}: not for an extension, which is one step")
            for key, value in (("joint", config.joint), ("single", config.single), ("lists", config.lists),
                               ("steps", config.steps), ("order", config.order), ("void_channel", config.void_channel))
        ),
        (config.class_weights != "none", "scenario.class_weights: not for an extension"),
        (config.validation != "none", "scenario.validation: not for an extension"),
    )  # fmt: skip
    known = read(Path(str(config.bundle))).through(config.branch, config.like)
    names = [str(name) for group in config.task for name in group]
    added = _added(names, dataset, known)
    space = known.space
    if added:
        space = replace(space, groups=(*space.groups, known.ids(added)), names=(*space.names, *added))
    policies = tested(policy_set(config.policy))
    new = [raw for raw, name in dataset.labels.names.items() if name in added]
    shared = shared_classes(dataset.labels, space, what=(f"data set '{dataset.name}'", "the bundle"))
    train_ids = shared.train_ids
    taught = list(train_ids)  # raw ids of the data that stand for a class of the extended model, old or new
    if absent := [
        dataset.labels.names[raw] for raw in new if not (np.asarray(counts["train"])[:, raw] > 0).any()
    ]:
        raise DataError(
            f"no training image of '{dataset.name}' has {', '.join(absent)}; check the masks (data check)"
        )
    if not taught:
        raise DataError(
            f"data set '{dataset.name}' labels no class that the bundle knows ({some(known.space.names, 12)}), so "
            f"nothing can be refined; name the classes to teach (--add) out of "
            f"{some([dataset.labels.names[raw] for raw in dataset.labels.classes], 12)}"
        )
    # "overlapped" hides the labels of old classes in training; the test always uses all of them.
    visible = [raw for raw in taught if config.protocol == "sequential" or raw in new]

    def source(split: str, ids: Sequence[int], policy: LabelPolicy) -> Source:
        table = space.lut_for(dataset.labels, train_ids, policy, ids)
        every = tuple(range(len(counts[split])))
        return Source(
            known.branch, dataset.name, split, every, packed(table, space.num_classes), config.domain or ""
        )

    return (
        Step(
            known.steps,
            (source("train", visible, policies.train),),
            (source(config.test_split, taught, policies.test),),
            {**known.spaces, known.branch: space},
            {known.branch: len(added)} if added else {},
            protocol=config.protocol,
        ),
    )


def tested(policies: PolicySet) -> PolicySet:
    """How an extension reads test labels: a class of the data that the model does not know counts as background.

    Benchmarks leave such pixels out, because a later step may teach them. Here nothing follows, and the new class is
    wrong on them.
    """
    return replace(policies, test=replace(policies.test, future=0))


@dataclass(frozen=True)
class Known:
    """What the model of a bundle knows. An extension continues from it."""

    spaces: Mapping[str, LabelSpace]
    """Branch -> its classes, under lasting ids."""
    next_id: int
    """The smallest id that no class of the bundle has ever had."""
    steps: int
    """Number of steps in which the model was trained."""
    where: str | Path
    """The bundle, for messages."""
    branch: str = ""
    """The branch that the new images take; see `through`."""

    @property
    def space(self) -> LabelSpace:
        """The classes of that branch."""
        return self.spaces[self.branch]

    def through(self, branch: str | None, like: str | None = None) -> Known:
        """Choose the branch that the new images take.

        Args:
            branch: its name; None = the only one. An unknown name is a new branch.
            like: the branch that a new one begins as a copy of.

        Raises:
            ConfigError: several branches and no choice, an unknown branch to begin from, or a background that is not
                its first output.
        """
        listed = ", ".join(self.spaces)
        spaces = dict(self.spaces)
        if branch is None:
            if len(spaces) > 1:
                raise ConfigError(
                    f"{self.where} has several branches: {listed}. Say which place the new images come from: "
                    "--domain NAME, one of these or a new one (scenario.branch)"
                )
            (branch,) = spaces
        elif branch not in spaces:
            if like not in spaces:
                raise ConfigError(
                    f"scenario.like: the new branch '{branch}' begins as a copy of another one; name one of {listed}"
                )
            spaces[branch] = spaces[like]
        found = replace(self, spaces=spaces, branch=branch)
        if found.space.background not in (0, None):
            raise ConfigError(
                f"{self.where}: the background must be the model's first output, but is output "
                f"{found.space.background}"
            )
        return found

    def ids(self, names: Sequence[str]) -> tuple[int, ...]:
        """Give new classes of the branch their raw ids: those that other branches have for them, else unused ones."""
        others = {
            spelling(name): raw
            for space in self.spaces.values()
            for name, raw in zip(space.names, space.order, strict=True)
            if raw >= 0
        }
        found, unused = [], self.next_id
        for name in names:
            raw = others.get(spelling(name))
            if raw is None:
                raw, unused = unused, unused + 1
            found.append(raw)
        return tuple(found)


def _added(names: Sequence[str], dataset: Dataset, known: Known) -> list[str]:
    """Look up the new classes and return their names as the data set spells them, in the order given."""
    labels = dataset.labels
    earlier = dict(known.space.formerly)
    choices = [
        labels.names[raw]
        for raw in labels.classes
        if find_name(labels.names[raw], (*known.space.names, *earlier)) is None
    ]
    added, problems = list[str](), list[str]()
    for name in names:
        old, found = find_name(name, known.space.names), find_name(name, choices)
        if old is None and (before := find_name(name, earlier)) is not None:
            old = earlier[before]
        if old is not None:
            as_it = "" if old == name else f" as '{old}'"
            problems.append(f"class '{name}': the bundle knows it already{as_it}; leave it out")
        elif found is None:
            hint = near_miss(
                name, choices, f"; it has {some(choices, 12) or 'none that the bundle does not know'}"
            )
            problems.append(f"class '{name}' is not in data set '{dataset.name}'{hint}")
        elif found in added:
            problems.append(f"class '{name}' is named twice")
        else:
            added.append(found)
    if problems:
        raise ConfigError(problems)
    return added
