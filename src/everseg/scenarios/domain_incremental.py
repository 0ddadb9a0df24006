"""Domain-incremental and mixed scenarios: steps that each bring a domain, more classes of one, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from everseg.config.fields import ScenarioConfig, StepConfig
from everseg.errors import ConfigError, DataError, near_miss
from everseg.labels import (
    BACKGROUND,
    SYNTHETIC_VOID,
    LabelPolicy,
    LabelSpace,
    PolicySet,
    RawLabels,
    policy_set,
)
from everseg.scenarios.class_incremental import class_incremental, validation_split
from everseg.scenarios.combine import arranged, chain, check_settings, cross_validation, holds_out_later
from everseg.scenarios.step_weights import weighted
from everseg.scenarios.steps import Labelled, Source, Step, Validation, missing_splits, packed
from everseg.scenarios.tasks import resolve_classes

VOID = "void"
"""Name of the output that `void_channel` adds."""


def build(
    config: ScenarioConfig, datasets: Mapping[str, Labelled], counts: Mapping[str, np.ndarray], *, seed: int
) -> tuple[Step, ...]:
    """Teach one domain after the other, each in a branch of its own; steps may add classes too.

    Args:
        datasets: domain -> its data set.
        counts: "domain/split" -> (N, 256) pixels per raw id of every image, in the order of the split.
        seed: decides the partitioned protocol and the held-out images, nothing else.

    Raises:
        ConfigError: steps, classes or settings that do not fit; all are named.
        DataError: a step without images.
    """
    check_settings(
        config,
        (config.lists is not None, "scenario.lists: image lists belong to scenario.kind=class-incremental"),
        (
            config.order is not None,
            "scenario.order: a class order belongs to scenario.kind=class-incremental",
        ),
    )
    steps = domain_incremental(
        datasets,
        counts,
        config.steps,
        protocol=config.protocol,
        policy=config.policy,
        seed=seed,
        void_channel=config.void_channel,
        test_split=config.test_split,
        validation="none" if holds_out_later(config) else config.validation,
    )
    return weighted(arranged(config, steps, seed=seed), config.class_weights, datasets, counts)


def needed_domains(steps: Sequence[StepConfig] | None, domains: Iterable[str]) -> list[str]:
    """List the domains that some step names, in the order of `domains`. Without steps, list all of them.

    Raises:
        ConfigError: a step names an unknown domain.
    """
    known = list(domains)
    if not steps:
        return known
    if unknown := [
        _unknown(i, step.domain, known) for i, step in enumerate(steps) if step.domain not in known
    ]:
        raise ConfigError(unknown)
    taught = {step.domain for step in steps}
    return [domain for domain in known if domain in taught]


def domain_incremental(
    datasets: Mapping[str, Labelled],
    image_classes: Mapping[str, np.ndarray],
    teaching: Sequence[StepConfig] | None = None,
    *,
    protocol: str = "overlapped",
    policy: str | PolicySet = "ignore-void",
    seed: int = 0,
    void_channel: bool = False,
    train_split: str = "train",
    test_split: str = "val",
    validation: Validation = "none",
) -> tuple[Step, ...]:
    """Teach domains one after the other, each in its own branch. A later step may add classes to an earlier domain.

    If one step teaches all classes of a domain, it trains on all images of the split, and the label space has a
    background only if the data set has one. If a domain is taught in several steps, or only in part, the rules of
    `class_incremental` apply to it and to every domain that shares its branch.

    Domains that name the same branch share it. Their classes are matched by name (`everseg.labels.spelling`), and the
    branch grows by the classes that it does not know yet.

    Each step tests every domain met so far, through the domain's own branch. `chain` joins the steps.

    Args:
        datasets: domain -> name and raw labels of its data set.
        image_classes: "domain/split" -> (N, 256) pixels per raw id of every image.
        teaching: what each step teaches; None = every domain with all its classes, in the order of `datasets`.
        protocol: which images belong to which step of a domain taught in several steps, as in `class_incremental`.
        policy: label convention, a name or a `PolicySet`.
        seed: decides `partitioned` and "cross", nothing else.
        void_channel: give every branch one more output for void (MDIL's last class). It is never a target, but it is
            part of the softmax. Not possible for branches with a background or branches that grow.
        validation: "none", "split" (the `val` split), "cross" (20 % of the step's training images, held out) or "train"
            (the training images).

    Raises:
        ConfigError: unknown domains, classes or splits; a domain or class named twice; a void output on a branch with
            a background or growth. The message names all of them.
        DataError: a step without images.
    """
    policies = policy_set(policy) if isinstance(policy, str) else policy
    needed = [train_split, test_split, *(["val"] if validation == "split" else [])]
    plan = _plan(datasets, teaching, image_classes, needed, void_channel)
    parts: dict[str, tuple[Step, ...]] = {}
    # "cross" holds out images of the steps as they are in the end, so it is applied to the finished chain.
    within: Validation = "none" if validation == "cross" else validation
    for domain, groups in plan.groups.items():
        counts = _of_splits(image_classes, domain)
        branch = plan.branches[domain]
        # The run's data and counts are keyed by domain, so sources must refer to the data by the domain's name.
        one = _Named(domain, datasets[domain].labels)
        if plan.is_whole(domain):
            splits = (train_split, test_split, validation_split(counts, test_split))
            steps = _whole(one, branch, groups[0], counts, policies, splits, within, void_channel)
        else:
            try:
                steps = class_incremental(
                    one,
                    tuple(groups),
                    counts,
                    protocol=protocol,
                    policy=policies,
                    seed=seed,
                    branch=branch,
                    train_split=train_split,
                    test_split=test_split,
                    validation=within,
                    strict=not plan.at_once(domain),
                )
            except DataError as error:
                raise DataError(f"domain '{domain}' (its own steps counted from 0): {error}") from None
        parts[domain] = tuple(_of_domain(step, domain) for step in steps)
    result = chain(*((parts[domain][number],) for domain, number in plan.order))
    _check_images(result)
    _check_void_outputs(result)
    return cross_validation(result, seed=seed) if validation == "cross" else result


@dataclass(frozen=True)
class _Named:
    """A data set under the name of its domain. The run finds the data by that name."""

    name: str
    labels: RawLabels


@dataclass
class _Plan:
    """Which step teaches which classes of which domain."""

    order: list[
        tuple[str, int]
    ]  # one entry per step: (domain, number of the step within that domain, from 0)
    groups: dict[str, list[tuple[int, ...]]]
    """Domain -> raw ids of each of its steps."""
    branches: dict[str, str]
    labels: Mapping[str, RawLabels]

    def is_whole(self, domain: str) -> bool:
        """Whether one step teaches the whole domain and its branch needs no artificial background."""
        sharing = [d for d, branch in self.branches.items() if branch == self.branches[domain]]
        if not all(self.at_once(d) for d in sharing):
            return False
        return self.labels[domain].background is not None or all(
            self.labels[d].background is None for d in sharing
        )

    def at_once(self, domain: str) -> bool:
        """Whether one step teaches all classes of the domain."""
        groups = self.groups[domain]
        return len(groups) == 1 and set(groups[0]) == set(self.labels[domain].classes)


def _plan(
    datasets: Mapping[str, Labelled],
    teaching: Sequence[StepConfig] | None,
    image_classes: Mapping[str, np.ndarray],
    splits: Sequence[str],
    void_channel: bool,
) -> _Plan:
    if teaching is None:
        teaching = [StepConfig(domain=domain) for domain in datasets]
    labels = {domain: dataset.labels for domain, dataset in datasets.items()}
    plan = _Plan([], {}, {}, labels)
    problems = [] if teaching else ["scenario.steps: no steps; name at least one domain"]
    for number, step in enumerate(teaching):
        problems += _add(plan, step, number)
    for domain in plan.groups:
        problems += missing_splits(f"domain '{domain}'", splits, _of_splits(image_classes, domain))
    if void_channel:
        problems += [
            f"scenario.void_channel: domain '{domain}' "
            + (
                "has a background class; a void output is for data without one"
                if labels[domain].background is not None
                else "is taught step by step, or shares its branch with one that is; it cannot have a void output"
            )
            for domain in plan.groups
            if labels[domain].background is not None or not plan.is_whole(domain)
        ]
    if problems:
        raise ConfigError(problems)
    return plan


def _add(plan: _Plan, step: StepConfig, number: int) -> list[str]:
    """Enter one step into the plan and return what is wrong with it."""
    where, domain = f"scenario.steps[{number}]", step.domain
    if domain not in plan.labels:
        return [_unknown(number, domain, plan.labels)]
    labels = plan.labels[domain]
    if step.classes is not None and step.add is not None:
        return [f"{where}: write classes (a domain met first) or add (a domain met before), not both"]
    taught = plan.groups.get(domain)
    first = next((i for i, (other, _) in enumerate(plan.order) if other == domain), None)
    if taught is None and step.add is not None:
        return [f"{where}.add: domain '{domain}' has not been met before; write classes for its first step"]
    if taught is not None and step.add is None:
        return [
            f"{where}: domain '{domain}' is named twice (first in step {first}); "
            "write add: [...] to teach more of its classes"
        ]
    key = "add" if taught is not None else "classes"
    given = step.add if taught is not None else step.classes
    ids, problems = list(labels.classes), list[str]()
    if given is not None:
        ids, problems = resolve_classes(given, labels, f"{where}.{key}")
        if not given:
            problems.append(f"{where}.{key}: teaches no class; name at least one, or leave it out")
    twice = [labels.names[raw] for raw in ids if any(raw in group for group in taught or ())]
    if twice:
        problems.append(f"{where}.add: taught before from domain '{domain}': {', '.join(twice)}")
    branch = plan.branches.setdefault(domain, step.branch or domain)
    if step.branch not in (None, branch):
        problems.append(f"{where}.branch: domain '{domain}' goes through '{branch}' already; leave it out")
    plan.order.append((domain, len(taught or ())))
    plan.groups.setdefault(domain, []).append(tuple(ids))
    return problems


def _of_splits(image_classes: Mapping[str, np.ndarray], domain: str) -> dict[str, np.ndarray]:
    """Select the tables of one domain: "domain/split" -> table becomes split -> table."""
    start = f"{domain}/"
    return {key.removeprefix(start): table for key, table in image_classes.items() if key.startswith(start)}


def _unknown(number: int, domain: str, known: Iterable[str]) -> str:
    names = list(known)
    return (
        f"scenario.steps[{number}].domain: no domain '{domain}' in data.domains ({', '.join(names)})"
        f"{near_miss(domain, names)}"
    )


def _whole(
    dataset: _Named,
    branch: str,
    group: Sequence[int],
    counts: Mapping[str, np.ndarray],
    policies: PolicySet,
    splits: tuple[str, str, str],
    validation: Validation,
    void_channel: bool,
) -> tuple[Step, ...]:
    """Build one step that teaches all classes of a domain on all its images."""
    labels, (train_split, test_split, val_split) = dataset.labels, splits
    head = () if labels.background is None else (labels.background,)
    tail = (SYNTHETIC_VOID,) if void_channel else ()
    names = (*(BACKGROUND for _ in head), *(labels.names[raw] for raw in group), *(VOID for _ in tail))
    space = LabelSpace(((*head, *group, *tail),), names, background=0 if head else None)

    def source(split: str, policy: LabelPolicy) -> Source:
        lut = packed(space.lut(space.order, policy, labels.names), space.num_classes)
        return Source(branch, dataset.name, split, tuple(range(len(counts[split]))), lut)

    train = source(train_split, policies.train)
    val: tuple[Source, ...] = (train,) if validation == "train" else ()
    if validation == "split":
        val = (source(val_split, policies.val),)
    test = source(test_split, policies.test)
    return (Step(0, (train,), (test,), {branch: space}, {branch: space.num_classes}, val),)


def _of_domain(step: Step, domain: str) -> Step:
    """Copy a step so that its results are stored under the name of the domain."""
    train, test, val = (
        tuple(replace(source, domain=domain) for source in sources)
        for sources in (step.train, step.test, step.val)
    )
    return replace(step, train=train, test=test, val=val)


def _check_images(steps: Sequence[Step]) -> None:
    empty = {
        f"data.domains.{source.domain}: split '{source.split}' has no image to {what}"
        for step in steps
        for what, sources in (("train on", step.train), ("test on", step.test))
        for source in sources
        if not source.indices
    }
    if empty:
        raise DataError("\n  ".join(["the scenario cannot be taught with these images:", *sorted(empty)]))


def _check_void_outputs(steps: Sequence[Step]) -> None:
    """Stop if a branch with a void output grows: the void output must stay the last one."""
    problems = []
    for step in steps:
        for branch, number in step.grows.items():
            space = step.spaces[branch]
            if SYNTHETIC_VOID in space.order[:-1]:
                new = ", ".join(space.names[space.num_classes - number :])
                problems.append(
                    f"scenario.void_channel: step {step.index} adds {new} to the branch '{branch}', but a branch with "
                    "a void output cannot get further classes; give the domain its own branch, or rename its classes"
                )
    if problems:
        raise ConfigError(problems)
