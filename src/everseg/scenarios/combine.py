"""Make scenarios of scenarios: all classes at once, one step alone, or several scenarios one after the other.

Joint, multi-task and single-task training are such scenarios run with fine-tuning, not methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from everseg.config.fields import ScenarioConfig
from everseg.errors import ConfigError, DataError
from everseg.labels import SYNTHETIC_VOID, LabelSpace, spelling
from everseg.scenarios.steps import Source, Step, packed

_HOLDOUT_STREAM = 0x4356
"""Part of the seed of the held-out images, so that no other draw of a run has the same random stream."""

_Key = tuple[str, str, str]


def check_settings(config: ScenarioConfig, *unfit: tuple[bool, str]) -> None:
    """Refuse settings that exclude one another, or that a kind of scenario has no use for.

    Args:
        unfit: pairs of a condition and the message for where it holds.

    Raises:
        ConfigError: all messages whose condition holds.
    """
    both = (
        config.joint and config.single,
        "scenario.single: cannot be combined with scenario.joint; choose one",
    )
    if problems := [text for wrong, text in (both, *unfit) if wrong]:
        raise ConfigError(problems)


def holds_out_later(config: ScenarioConfig) -> bool:
    """Whether `arranged` holds out images after joining, so that no step trains what another step holds out."""
    return config.joint and config.validation == "cross"


def arranged(config: ScenarioConfig, steps: tuple[Step, ...], *, seed: int) -> tuple[Step, ...]:
    """Arrange steps as a configuration says: as they are, all in one (`joint`), or each from scratch (`single`)."""
    if config.joint:
        steps = joint(steps)
    if config.single:
        steps = singles(steps)
    return cross_validation(steps, seed=seed) if holds_out_later(config) else steps


def cross_validation(steps: Sequence[Step], *, seed: int, share: float = 0.8) -> tuple[Step, ...]:
    """Hold out part of every step's training images for validation, labelled as in training.

    Args:
        steps: their validation images are replaced.
        seed: the draw is a function of (seed, step index, number of images) only.
        share: part that stays for training; rounded down to whole images, as the authors' 80/20 split.

    Raises:
        DataError: a step has too few images to keep one and hold one out.
    """
    result, problems = [], []
    for step in steps:
        train, val = [], []
        for number, source in enumerate(step.train):
            indices = np.array(source.indices, np.int64)
            keep = int(share * len(indices))  # rounded down, as in the authors' code
            if not 0 < keep < len(indices):
                problems.append(
                    f"step {step.index}: {len(indices)} training image(s) cannot be split for validation; "
                    f"set scenario.validation to none, split or train"
                )
                continue
            stream = np.random.default_rng([seed, _HOLDOUT_STREAM, step.index, number])
            drawn = stream.permutation(len(indices))
            # Sorted again: both parts keep the order of the source.
            train.append(replace(source, indices=tuple(indices[np.sort(drawn[:keep])].tolist())))
            val.append(replace(source, indices=tuple(indices[np.sort(drawn[keep:])].tolist())))
        result.append(replace(step, train=tuple(train), val=tuple(val)))
    if problems:
        raise DataError("\n  ".join(["scenario.validation:", *problems]))
    return tuple(result)


def joint(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Teach everything at once: the upper bound of a scenario.

    One step over the union of all training images, with every class of the scenario labelled; tested as after
    the last step. The label spaces keep the scenario's groups, so that scores are reported for the same old and
    new classes; all outputs come in one growth, so in one classifier. Images held out for validation in any step
    are not trained. Class weights are not taken over.

    Raises:
        ConfigError: no steps.
    """
    if not steps:
        raise ConfigError("joint: the scenario has no steps")
    last = steps[-1]
    train = _merged((source for step in steps for source in step.train), last)
    val = _merged((source for step in steps for source in step.val), last)
    # An image that one step held out may be trained in another. The joint model must not see it in training, unless
    # validation is meant to be on the training images.
    validated_on_train = all(_images(step.val) == _images(step.train) for step in steps)
    if not validated_on_train:
        held_out = _images(val)
        train = tuple(
            replace(s, indices=tuple(i for i in s.indices if (s.dataset, s.split, i) not in held_out))
            for s in train
        )
    # All outputs in one growth: nothing is old in the first and only step.
    grows = {branch: space.num_classes for branch, space in last.spaces.items()}
    return (Step(0, train, last.test, dict(last.spaces), grows, val),)


def single(scenario: Sequence[Step], index: int) -> tuple[Step, ...]:
    """Teach what one step teaches alone, from scratch, on that step's images.

    The label space of each branch trained holds its background and void outputs and the step's own classes: those the
    branch gains, and those that no earlier step taught from the same data. Classes taught in earlier steps are
    background in training and, in the step's test and validation images, what not yet taught classes are there. Data
    that the step does not train are not tested.

    Raises:
        ConfigError: no such step.
    """
    if not 0 <= index < len(scenario):
        raise ConfigError(f"single: no step {index}; the scenario has steps 0 to {len(scenario) - 1}")
    step = scenario[index]
    own = {branch: _own_outputs(scenario, index, branch) for branch in step.trained_branches}
    spaces = {branch: _cut(step.spaces[branch], kept) for branch, kept in own.items()}
    trained = {(source.branch, source.dataset) for source in step.train}

    # Train ids of the step -> those of the model that learns this step alone; all other outputs become `other`.
    def remapped(source: Source, other: int) -> Source:
        kept = own[source.branch]
        size = step.spaces[source.branch].num_classes
        table = [kept.index(old) if old in kept else other for old in range(size)]
        return _through(source, table, spaces[source.branch])

    # How the scenario labels not yet taught classes in test images differs by policy (background or ignored). An
    # earlier step that tested the same images shows it: its table has an entry for a class that it did not know yet.
    def unknown(source: Source) -> int:
        space = step.spaces[source.branch]
        new = next((i for i in own[source.branch] if i != space.background and space.order[i] >= 0), None)
        for earlier in scenario[:index]:
            for other in (*earlier.test, *earlier.val):
                if _key(other) == _key(source) and new is not None:
                    found = other.lut[space.order[new]]
                    return spaces[source.branch].ignored if found == other.ignored else found
        return spaces[source.branch].ignored

    def neutral(source: Source) -> int:
        space = spaces[source.branch]
        return space.ignored if space.background is None else space.background

    test = [source for source in step.test if (source.branch, source.dataset) in trained]
    return (
        Step(
            0,
            tuple(remapped(source, neutral(source)) for source in step.train),
            tuple(remapped(source, unknown(source)) for source in test),
            spaces,
            {branch: space.num_classes for branch, space in spaces.items()},
            tuple(remapped(source, unknown(source)) for source in step.val),
            # The classes of the steps before a later step are background here, whatever its protocol said of them.
            protocol=step.protocol if index == 0 else "",
        ),
    )


def singles(scenario: Sequence[Step]) -> tuple[Step, ...]:
    """Make every step of a scenario a scenario of its own, from scratch and under its own index: single-task models."""
    return tuple(
        replace(single(scenario, index)[0], index=index, fresh=True) for index in range(len(scenario))
    )


def chain(*scenarios: Sequence[Step]) -> tuple[Step, ...]:
    """Run scenarios one after the other in one model.

    A branch met again keeps growing. Names tell its classes apart (`everseg.labels.spelling`): a class that it knows
    already (and the background) keeps its output and spelling, and the others get new outputs behind. Images that an
    earlier scenario tested last are tested after every later step as well. Class weights are dropped: they belong to
    the outputs of the result.
    """
    known: dict[str, LabelSpace] = {}
    carried: dict[_Key, Source] = {}
    result: list[Step] = []
    for scenario in scenarios:
        tested: dict[_Key, Source] = {}
        for step in scenario:
            # Extend the label space of each branch by the classes whose names it does not know yet.
            grows = {}
            for branch, space in step.spaces.items():
                before = known[branch].num_classes if branch in known else 0
                known[branch] = _grown(known.get(branch), space)
                if known[branch].num_classes > before:
                    grows[branch] = known[branch].num_classes - before
            # Train id in the step's own scenario -> train id in the chained one.
            moved = {branch: _positions(space, known[branch]) for branch, space in step.spaces.items()}
            # Images tested by an earlier scenario and by this one become one source, with the labels of both.
            tested = dict(carried)
            for source in step.test:
                source = _through(source, moved[source.branch], known[source.branch])
                if _key(source) in tested:
                    source = united([tested[_key(source)], source], known[source.branch])
                tested[_key(source)] = source
            train = tuple(
                _through(source, moved[source.branch], known[source.branch]) for source in step.train
            )
            val = tuple(_through(source, moved[source.branch], known[source.branch]) for source in step.val)
            result.append(Step(len(result), train, tuple(tested.values()), dict(known), grows, val))
        carried = tested or carried
    return tuple(result)


def _key(source: Source) -> _Key:
    return source.branch, source.dataset, source.split


def _images(sources: Iterable[Source]) -> set[tuple[str, str, int]]:
    return {(source.dataset, source.split, i) for source in sources for i in source.indices}


def _merged(sources: Iterable[Source], last: Step) -> tuple[Source, ...]:
    """Merge sources to one per branch, data set and split: the union of images, with every class that any labels."""
    together: dict[_Key, list[Source]] = {}
    for source in sources:
        together.setdefault(_key(source), []).append(source)
    return tuple(united(parts, last.spaces[key[0]]) for key, parts in together.items())


def united(parts: Sequence[Source], space: LabelSpace) -> Source:
    """Unite images, ascending. Where tables differ, classes win over background and ignored, then the last source."""
    lut = [space.ignored if train_id == parts[-1].ignored else train_id for train_id in parts[-1].lut]
    for part in parts:
        for raw, train_id in enumerate(part.lut):
            if train_id not in (space.background, part.ignored):
                lut[raw] = train_id
    indices = sorted({i for part in parts for i in part.indices})
    return replace(parts[-1], indices=tuple(indices), lut=packed(lut, space.num_classes))


def _through(source: Source, table: Sequence[int], space: LabelSpace) -> Source:
    """Send the train ids of a source through table[id]; ignored stays ignored."""
    lut = (space.ignored if v == source.ignored else table[v] for v in source.lut)
    return replace(source, lut=packed(lut, space.num_classes))


def _own_outputs(scenario: Sequence[Step], index: int, branch: str) -> list[int]:
    """Outputs that a step teaches a branch, see `single`, with those of background and void; ascending."""
    step = scenario[index]
    space = step.spaces[branch]
    # What earlier steps taught this branch, by data set and raw id: the same id may mean something else elsewhere.
    before = {
        (source.dataset, raw)
        for earlier in scenario[:index]
        for source in earlier.train
        if source.branch == branch
        for raw in source.labelled(earlier.spaces[branch])
    }
    gained = range(step.num_old(branch), space.num_classes)
    # A known output may be taught from this data set for the first time, without growing the branch.
    labelled = {
        source.lut[raw]
        for source in step.train
        if source.branch == branch
        for raw in source.labelled(space)
        if (source.dataset, raw) not in before
    }
    special = (i for i, raw in enumerate(space.order) if i == space.background or raw == SYNTHETIC_VOID)
    return sorted({*gained, *labelled, *special})


def _cut(space: LabelSpace, kept: Sequence[int]) -> LabelSpace:
    """Cut a space to these outputs, in one group; a space without others comes back as it is."""
    if len(kept) == space.num_classes:
        return space
    return LabelSpace(
        groups=(tuple(space.order[i] for i in kept),),
        names=tuple(space.names[i] for i in kept),
        background=None if space.background is None else list(kept).index(space.background),
    )


def _positions(space: LabelSpace, known: LabelSpace) -> list[int]:
    """Train id in a label space -> train id of the same class, maybe in another spelling, in one that knows all."""
    there = {spelling(name): i for i, name in enumerate(known.names)}
    return [there[spelling(name)] for name in space.names]


def _grown(known: LabelSpace | None, space: LabelSpace) -> LabelSpace:
    """Append to a known space the classes of another one whose names are new."""
    if known is None:
        return space
    # Known classes keep their outputs, whatever their raw ids are in the other space; new ones form a group behind.
    met = set(map(spelling, known.names))
    new = [i for i, name in enumerate(space.names) if spelling(name) not in met]
    if not new:
        return known
    names = (*known.names, *(space.names[i] for i in new))
    background = known.background
    if background is None and space.background is not None:
        background = list(map(spelling, names)).index(spelling(space.names[space.background]))
    group = tuple(space.order[i] for i in new)
    return LabelSpace(groups=(*known.groups, group), names=names, background=background)
