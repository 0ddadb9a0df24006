"""What kind of run a report is about, and every sentence of the page that is true for some kinds only.

The kind comes from the scenario: how many steps are finished says nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from everseg.runs.results import Results


class Kind(StrEnum):
    """Kind of a run, in the words of the page."""

    FIRST = "first training"
    SEQUENCE = "sequence of steps"
    DOMAINS = "sequence over domains"
    EXTENSION = "extension of a deployed model by new classes"
    REFINEMENT = "refinement of a deployed model on more images"
    JOINT = "joint training"
    SINGLE = "single-task training"


def kind_of(results: Results) -> Kind:
    """Find the kind of a run from its configuration and from the steps that its scenario plans.

    Raises:
        CheckpointError: run.json or scenario.json is damaged.
    """
    scenario = results.config.scenario
    if scenario.kind == "extension":
        return Kind.EXTENSION if any(scenario.task) and isinstance(scenario.task, list) else Kind.REFINEMENT
    if scenario.single:
        return Kind.SINGLE
    if scenario.joint:
        return Kind.JOINT
    if results.config.data.domains:
        return Kind.DOMAINS
    return Kind.SEQUENCE if len(results.planned) > 1 else Kind.FIRST


@dataclass(frozen=True)
class Words:
    """What the page says of one kind of run."""

    scores: str
    """Of the table of old, new and all classes."""
    groups: tuple[str, ...]
    """The columns of that table."""
    per_class: str
    """Of the IoU per class. "{step}" is the number of the last step."""
    mark: str
    """What the earlier value per class is; "" where there is none."""
    pictures: str
    """Heading of the test images."""
    models: str
    """Which models predict these images. "{steps}" are the numbers of the steps."""
    compared: str
    """What the last column of the pictures says."""
    changes: tuple[str, ...]
    """Text of each colour of that column that occurs, in the order of `picture_grid.CHANGES`; "" = does not occur."""
    training: str
    """Of the curves of training."""
    data: str
    """Heading of the data."""
    domains: str = ""
    """Heading of the table of domains."""
    per_domain: str = ""
    """Of that table."""


_MEANS = "The means are shown with and without background, because papers differ in that."
_OVER_STEPS = (
    "right",
    "forgotten: right after an earlier step, wrong now",
    "learnt: right now for the first time",
    "wrong after every step",
    "not labelled",
)
_ONE_MODEL = ("right", "", "", "wrong", "not labelled")
_EXTENDED = (
    "right",
    "forgotten: right with the deployed model, wrong now",
    "learnt: right now, wrong with the deployed model",
    "wrong with both models",
    "not judged",
)
_CURVES = "Read from journal.jsonl."
_SEVERAL_CURVES = (
    f"{_CURVES} The iterations of all steps follow one another; a dashed line marks where a step begins."
)
_AFTER = "IoU of each class after step {step}, in percent"

WORDS: Mapping[Kind, Words] = {
    Kind.FIRST: Words(
        scores=f"mIoU in percent after the training. Nothing was learnt before, so no class is old. {_MEANS}",
        groups=("all",),
        per_class="IoU of each class after the training, in percent",
        mark="",
        pictures="Test images and what the model makes of them",
        models="the trained model",
        compared="The last column says where the model is right.",
        changes=_ONE_MODEL,
        training=_CURVES,
        data="Data of the training",
    ),
    Kind.SEQUENCE: Words(
        scores=(
            "mIoU in percent after each step. New: the classes learnt in that step; old: all learnt before it; base: "
            f"those of the first step. {_MEANS}"
        ),
        groups=("old", "new", "base", "all"),
        per_class=_AFTER,
        mark="when it was learnt",
        pictures="Test images through every step's model",
        models="the models of steps {steps}",
        compared="The last column compares the last step with the steps before it.",
        changes=_OVER_STEPS,
        training=_SEVERAL_CURVES,
        data="Data of every step",
    ),
    Kind.DOMAINS: Words(
        scores=(
            "mIoU in percent on the images of this domain, after each step that tested it. New: the classes that the "
            f"model of this domain learnt last; old: those it knew before; base: its first. {_MEANS}"
        ),
        groups=("old", "new", "base", "all"),
        per_class=f"{_AFTER}, on the images of this domain",
        mark="when it was first tested",
        pictures="Test images through every step's model",
        models="the models of steps {steps}",
        compared="The last column compares the last step with the steps before it that knew the domain.",
        changes=_OVER_STEPS,
        training=_SEVERAL_CURVES,
        data="Data of every step",
        domains="Every domain after every step",
        per_domain="mIoU in percent over all classes of the domain known then. A dot: not tested yet.",
    ),
    Kind.EXTENSION: Words(
        scores=(
            "mIoU in percent of the extended model on the new test images. New: the classes taught now; old: those "
            f"that the deployed model knew; base: those of its first training. {_MEANS}"
        ),
        groups=("old", "new", "base", "all"),
        per_class="IoU of each class with the extended model, on the new test images, in percent",
        mark="with the deployed model",
        pictures="New test images through the deployed model and its extension",
        models="the deployed model and its extension (steps {steps})",
        compared="The last column compares the extension with the deployed model.",
        changes=_EXTENDED,
        training=_CURVES,
        data="Data of the extension",
    ),
    Kind.REFINEMENT: Words(
        scores="",
        groups=("all",),
        per_class="IoU of each class with the refined model, on the new test images, in percent",
        mark="with the deployed model",
        pictures="New test images through the deployed model and the refined one",
        models="the deployed model and the refined one (steps {steps})",
        compared="The last column compares the refined model with the deployed one.",
        changes=_EXTENDED,
        training=_CURVES,
        data="Data of the refinement",
    ),
    Kind.JOINT: Words(
        scores=(
            "mIoU in percent after the training on the images of all steps at once. Every class was learnt at the same "
            "time. Old and new only say what the steps of the same task would teach: new in its last step, old before "
            f"it, base in its first. {_MEANS}"
        ),
        groups=("old", "new", "base", "all"),
        per_class="IoU of each class after the training, in percent",
        mark="",
        pictures="Test images and what the model makes of them",
        models="the jointly trained model",
        compared="The last column says where the model is right.",
        changes=_ONE_MODEL,
        training=_CURVES,
        data="Data of the training",
        domains="Every domain",
        per_domain="mIoU in percent over all classes of the domain. One model was trained on all domains at once.",
    ),
    Kind.SINGLE: Words(
        scores=f"mIoU in percent of the model that was trained on this domain alone. {_MEANS}",
        groups=("all",),
        per_class="IoU of each class with the model of this domain, in percent",
        mark="",
        pictures="Test images and what the model of their domain makes of them",
        models="the model of their own domain",
        compared="The last column says where the model is right.",
        changes=_ONE_MODEL,
        training=(
            f"{_CURVES} The iterations of all models follow one another; a dashed line marks where the training of the "
            "next model begins."
        ),
        data="Data of every model",
        domains="Every domain with a model of its own",
        per_domain="mIoU in percent over all classes of the domain. A dot: this model was not trained on the domain.",
    ),
}
"""Kind x sentence: all that the page says of some kinds only, beside its headline."""
