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
    """Of the table of old, new and all classes; "" = no such table."""
    parted: str
    """What old and new mean there; "" where no class is old."""
    base: str
    """What base means there."""
    per_class: str
    """Of the IoU per class. "{step}" is the number of the last step."""
    mark: str
    """What the earlier value per class is; "" where there is none."""
    pictures: str
    """Heading of the test images."""
    model: str
    """Which model the last one is. "{step}" is its step."""
    together: bool
    """Whether one training taught all classes, so that none was learnt before another."""
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


MEANS = "The means are shown with and without background, because papers differ in that."
"""Of tables that have both."""
_OVER_STEPS = (
    "right",
    "forgotten: was right before",
    "learnt: was wrong before",
    "wrong before and now",
    "not labelled",
)
_ONE_MODEL = ("right", "", "", "wrong", "not labelled")
_EXTENDED = (
    "right",
    "forgotten: was right before",
    "learnt: was wrong before",
    "wrong before and now",
    "not judged",
)
_CURVES = "Read from journal.jsonl."
_SEVERAL_CURVES = (
    f"{_CURVES} The iterations of all steps follow one another; a dashed line marks where a step begins."
)
_AFTER = "IoU of each class after step {step}, in percent"

WORDS: Mapping[Kind, Words] = {
    Kind.FIRST: Words(
        scores="mIoU in percent after the training. Nothing was learnt before, so no class is old.",
        parted="",
        base="",
        per_class="IoU of each class after the training, in percent",
        mark="",
        pictures="Test images and what the model makes of them",
        model="the model",
        together=True,
        models="the trained model",
        compared="The last column says where the model is right.",
        changes=_ONE_MODEL,
        training=_CURVES,
        data="Data of the training",
    ),
    Kind.SEQUENCE: Words(
        scores="mIoU in percent after each step.",
        parted="New: the classes learnt in that step; old: all learnt before it.",
        base="Base: those of step 0.",
        per_class=_AFTER,
        mark="when it was learnt",
        pictures="Test images through every step's model",
        model="the model of step {step}",
        together=False,
        models="the models of steps {steps}",
        compared="The last column compares the last step with the steps before it. Before: after at least one of them.",
        changes=_OVER_STEPS,
        training=_SEVERAL_CURVES,
        data="Data of every step",
    ),
    Kind.DOMAINS: Words(
        scores="mIoU in percent on the images of this domain, after each step that tested it.",
        parted="New: the classes that the model of this domain learnt last; old: those it knew before.",
        base="Base: those it learnt first.",
        per_class=f"{_AFTER}, on the images of this domain",
        mark="when it was first tested",
        pictures="Test images through every step's model",
        model="the model of step {step}",
        together=False,
        models="the models of steps {steps}",
        compared="The last column compares the last step with the steps before it that knew the domain.",
        changes=_OVER_STEPS,
        training=_SEVERAL_CURVES,
        data="Data of every step",
        domains="Every domain after every step",
        per_domain="mIoU in percent over all classes of the domain known then. A dot: not tested yet.",
    ),
    Kind.EXTENSION: Words(
        scores="mIoU in percent of the extended model on the new test images.",
        parted="New: the classes taught now; old: those that the deployed model knew.",
        base="Base: those of its first training.",
        per_class="IoU of each class with the extended model, on the new test images, in percent",
        mark="with the deployed model",
        pictures="New test images through the deployed model and its extension",
        model="the extended model",
        together=False,
        models="the deployed model and its extension (steps {steps})",
        compared="The last column compares the extension with the deployed model.",
        changes=_EXTENDED,
        training=_CURVES,
        data="Data of the extension",
    ),
    Kind.REFINEMENT: Words(
        scores="",
        parted="",
        base="",
        per_class="IoU of each class with the refined model, on the new test images, in percent",
        mark="with the deployed model",
        pictures="New test images through the deployed model and the refined one",
        model="the refined model",
        together=False,
        models="the deployed model and the refined one (steps {steps})",
        compared="The last column compares the refined model with the deployed one.",
        changes=_EXTENDED,
        training=_CURVES,
        data="Data of the refinement",
    ),
    Kind.JOINT: Words(
        scores=(
            "mIoU in percent after the training on the images of all steps at once. Every class was learnt at the same "
            "time."
        ),
        parted=(
            "Old and new only say what the steps of the same task would teach: new in its last step, old before it."
        ),
        base="Base: in its first.",
        per_class="IoU of each class after the training, in percent",
        mark="",
        pictures="Test images and what the model makes of them",
        model="the model",
        together=True,
        models="the jointly trained model",
        compared="The last column says where the model is right.",
        changes=_ONE_MODEL,
        training=_CURVES,
        data="Data of the training",
        domains="Every domain",
        per_domain="mIoU in percent over all classes of the domain. One model was trained on all domains at once.",
    ),
    Kind.SINGLE: Words(
        scores="mIoU in percent of the model that was trained on this domain alone.",
        parted="",
        base="",
        per_class="IoU of each class with the model of this domain, in percent",
        mark="",
        pictures="Test images and what the model of their domain makes of them",
        model="the model of this domain",
        together=True,
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
