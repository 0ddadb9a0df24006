"""The words on the page of a run, each with its meaning."""

from __future__ import annotations

from collections.abc import Iterable

from everseg.reports.kinds import Kind
from everseg.runs.results import Results

MEANINGS = {
    "IoU": "intersection over union of one class: the pixels that are of the class and called so, divided by the "
    "pixels that are of the class or called so. In percent; 100 is perfect",
    "mIoU": "the mean of the IoU over classes. Classes without a true pixel are left out",
    "Dice": "twice the pixels that are of a class and called so, divided by the true pixels plus the pixels called so",
    "accuracy": "the share of the labelled test pixels that are right",
    "boundary IoU": "the IoU of the strips along the outlines of a class, as wide as 2 % of the image's diagonal",
    "step": "one training with classes or images of its own. Step 0 is the first",
    "old, new, base": "in a step: the classes learnt before it, those learnt in it, and those of step 0",
    "average": "the mean over the steps of the mIoU of all that was tested then",
    "forgetting": "what earlier classes have lost, in points: their best mIoU after an earlier step minus their mIoU "
    "after the last one. Negative: they got better",
    "backward transfer": "the change of earlier classes since they were learnt, in points: their mIoU after the last "
    "step minus the one when they were new. Negative: they got worse",
    "joint training": "one training on the images of all steps at once, which sees every label. Usually the upper "
    "bound",
    "domain": "images of one origin, such as a city, a season or a camera",
    "relative drop": "the mean over domains of (mIoU here - mIoU of a model trained on this domain alone) / the "
    "latter, in percent. Negative: worse than such models",
    "label policy": "the rule that says what training and tests make of pixels without a class, and of old and later "
    "classes",
    "seed": "the number that all random choices of a run begin with. The same seed on the same machine gives the same "
    "result",
}
"""Word -> meaning. docs/glossary.md begins its entries with these texts; a test compares them."""
_SCORES = ("IoU", "mIoU", "Dice", "accuracy")
_STEPS = ("step", "old, new, base", "average", "forgetting", "backward transfer")
PROTOCOLS = {
    "overlapped": "a step's images may also show classes of other steps. There these have no label",
    "disjoint": "a step's images show only its own classes and earlier ones. Earlier ones have no label there",
    "sequential": "a step's images keep the labels of earlier classes",
    "partitioned": "every image belongs to one step only",
}
_LOSSES = {
    "sum": "all terms together, which the training makes smaller",
    "ce": "cross-entropy: how far the predictions are from the labels",
    "bce": "binary cross-entropy: the same, with a yes or no for each class",
    "bce_pixel": "binary cross-entropy of the pixels",
    "icarl": "binary cross-entropy with the earlier model's answers as labels of old classes",
    "kd": "knowledge distillation: how far the predictions are from those of the model before the step",
    "kd_domains": "the same on the earlier domains' parts of the model",
    "memory": "cross-entropy on images of earlier steps",
    "soft": "cross-entropy with the earlier model's probabilities where it is unsure",
    "penalty": "how far weights that matter for old classes have moved",
    "feature": "how far the features are from those of the model before the step",
    "features": "how far the features are from those of the model before the step",
    "attention": "how far the attention is from that of the model before the step",
    "contrast": "how close features of different classes are to each other",
}
"""Meaning of loss terms, by their name in the journal."""


def words(results: Results, kind: Kind, terms: Iterable[str], *, joint: bool) -> list[tuple[str, str]]:
    """List the words that a report uses, each with its meaning.

    Args:
        kind: of the run.
        terms: names of the loss terms that the page shows.
        joint: whether the page shows a joint run.
    """
    config = results.config
    found = list(_SCORES)
    if any(track.boundary is not None for track in results.tracks):
        found.append("boundary IoU")
    if kind in (Kind.SEQUENCE, Kind.DOMAINS):
        found += _STEPS
    if kind is Kind.JOINT or joint:
        found.append("joint training")
    if config.data.domains:
        found += ("domain", "relative drop")
    told = [(name, MEANINGS[name]) for name in found]
    if not config.data.domains and kind in (Kind.SEQUENCE, Kind.JOINT, Kind.EXTENSION):
        protocol = config.scenario.protocol
        told.append((f"protocol {protocol}", PROTOCOLS[protocol]))
    told.append((f"label policy {results.policy}", f"{MEANINGS['label policy']} (everseg docs data)"))
    told.append(("seed", MEANINGS["seed"]))
    method = config.method.name
    for name in terms:
        known = _LOSSES.get(name, f"a loss term of the method {method} (everseg docs methods)")
        told.append((f"loss term {name}", known))
    return told
