"""Quality of the old classes after an extension: measured on labels, or estimated from agreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from everseg.config.fields import DataConfig, ScenarioConfig
from everseg.data.base import Dataset
from everseg.data.batches.loader import normalised_batches
from everseg.deploy.feature_sketch import Movement, can_sketch, cells, vector_draws, what_stays
from everseg.display import capital, percent
from everseg.engine.rescore import source_by_name
from everseg.errors import ConfigError, DataError, some
from everseg.inference.count import evaluate, through, views_of
from everseg.labels import LabelSpace
from everseg.metrics import LEVEL, RESAMPLES, ConfusionMatrix, defined_means, interval, resampled_sums
from everseg.metrics.scores import EPS, class_accuracy, iou
from everseg.models.model import SegmentationModel
from everseg.progress import Progress
from everseg.reports.extension import ROUNDING
from everseg.runs.input_form import InputForm
from everseg.runs.sketch import Sketch
from everseg.scenarios.steps import Source, packed

LOOKED = 32
"""Most images in which the deployed model is asked for its classes before an extension begins."""


@dataclass(frozen=True)
class Kept:
    """Quality of the old classes that is left, relative to the deployed model."""

    how: str
    """"measured" on labelled images, or "estimated" from agreement."""
    share: float | None
    """Share that the gate compares with its limit; None if it is unknown. Of several branches it is the lowest.

    Measured: the new model's mean IoU over the old classes, divided by the deployed model's.
    Estimated: see `estimated`.
    """
    classes: Mapping[str, Mapping[str, float | None]]
    """Old class -> its figures."""
    figures: Mapping[str, float]
    """The means behind `share`."""
    text: str
    """Summary in one sentence."""
    interval: tuple[float, float] | None = None
    """Where 95 % of the shares lie when as many test images are drawn with replacement; None if that is undefined. It
    does not say how far agreement is from quality."""
    notes: tuple[str, ...] = ()
    """Remarks on class names of the images and of the model that differ in spelling or have no match."""

    def below(self, limit: float) -> list[str]:
        """The judged old classes of which less than a share is left, each with what is left, in percent."""
        shares = {name: figures.get("share") for name, figures in self.classes.items()}
        return [
            f"{name} {percent(left)}"
            for name, left in shares.items()
            if left is not None and left < limit - ROUNDING
        ]


@dataclass(frozen=True)
class Gate:
    """What is asked of an extension: shares of the old classes' quality that must be left, 0 to 1; None = not asked.

    Raises:
        ConfigError: a share is not above 0, or above 1.
    """

    mean: float | None = None
    """In the mean over the old classes that are judged."""
    each: float | None = None
    """Of every one of them."""

    def __post_init__(self) -> None:
        options = {"--keep-at-least": self.mean, "--keep-each-at-least": self.each}
        if bad := [f"{key} {v:g}" for key, v in options.items() if v is not None and not 0 < v <= 1]:
            raise ConfigError(f"{', '.join(bad)}: expected a share above 0, at most 1")

    @property
    def text(self) -> str:
        """What is asked; "" if nothing is."""
        asked = (("", self.mean), (" of each class", self.each))
        return " and ".join(f"at least {percent(limit)} %{of}" for of, limit in asked if limit is not None)

    def verdict(self, kept: Kept) -> str:
        """PASS or FAIL and the reason; "" if nothing is asked."""
        if why := self.fails(kept):
            return f"FAIL, {why}"
        return f"PASS, {self.text} was asked for" if self.text else ""

    def fails(self, kept: Kept) -> str:
        """Say in a sentence, without its stop, why the quality does not suffice; "" if it does."""
        if not self.text:
            return ""
        left = "it is not known how much" if kept.share is None else f"{percent(kept.share)} %"
        whole = f"{left} of the old classes' quality is left, {self.text} was asked for"
        low = kept.below(self.each) if self.each is not None else []
        if low:
            return f"{whole}; less is left of {some(low, 8)} %"
        enough = kept.share is not None and (self.mean is None or kept.share >= self.mean - ROUNDING)
        return "" if enough else whole


@dataclass(frozen=True)
class Pair:
    """The deployed model and the model that was extended from it."""

    before: SegmentationModel
    after: SegmentationModel
    old: LabelSpace
    new: LabelSpace
    branch: str

    @property
    def classes(self) -> list[int]:
        """Train ids of the old classes without background. They are the same in both models."""
        return [i for i in range(self.old.num_classes) if i != self.old.background]


def measured(
    pair: Pair,
    dataset: Dataset,
    data: DataConfig,
    scenario: ScenarioConfig,
    accelerator: Accelerator,
    progress: Progress,
    *,
    batch: int,
) -> Kept:
    """Score both models on images with labels of old classes.

    Args:
        data: how images are brought to the networks.
        scenario: which split is tested, and how its labels are read.
        batch: images at once.

    Raises:
        DataError: the data share no class with the model, or the deployed model finds none of its classes.
    """
    means, per_class, draws, seen = [], [], [], list[int]()
    source, notes = source_by_name(dataset, scenario, pair.branch, pair.old)
    # Both models are counted on the same pixels. A predicted new class is wrong there.
    outputs = {source.name: pair.new.num_classes}
    for model, title in ((pair.before, "deployed model"), (pair.after, "new model")):
        result = evaluate(
            model, [source], {source.dataset: dataset}, data, accelerator, progress,
            batch=batch, title=f"{title} on the old classes", outputs=outputs, keep=0,
        )  # fmt: skip
        each = iou(result.counts[source.name])[pair.classes]
        seen = [c for c, value in zip(pair.classes, each, strict=True) if not np.isnan(value)]
        per_class.append(each)
        means.append(_mean(each))
        # Both models see the same images, so they share the draws. Each is (RESAMPLES, old classes), in pixels.
        truth, said, both = np.moveaxis(_draws(result.images[source.name])[:, :, pair.classes], 1, 0)
        draws.append(defined_means(np.where(truth > 0, both / (truth + said - both + EPS), np.nan)))
    if not means[0] > 0:
        raise DataError(
            f"the deployed model finds none of its classes in '{dataset.name}', so nothing can be compared"
        )
    share = means[1] / means[0]
    names = [pair.old.names[i] for i in pair.classes]
    classes = {
        name: {"deployed": _defined(a), "new": _defined(b), "share": _defined(b / a) if a > 0 else None}
        for name, a, b in zip(names, *per_class, strict=True)
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        between = _interval(draws[1] / draws[0])
    return Kept(
        "measured", share, classes, {"deployed_miou": means[0], "new_miou": means[1]},
        f"old classes measured on '{dataset.name}': mIoU {percent(means[0])} before, {percent(means[1])} after, "
        f"{percent(share)} % kept{_between(between)}, over {_judged(pair, seen)}",
        between, tuple(notes),
    )  # fmt: skip


def unlabelled(source: Source, branch: str, space: LabelSpace) -> Source:
    """The images of a source through another branch, whose classes their labels do not speak of."""
    nothing = packed([space.ignored] * len(source.lut), space.num_classes)
    return replace(source, branch=branch, lut=nothing)


def together(parts: Mapping[str, Kept]) -> Kept:
    """Join what is left in several branches. The share is that of the branch that kept least.

    Args:
        parts: branch -> what is left in it; at least one. One alone stays as it is.
    """
    if len(parts) == 1:
        return next(iter(parts.values()))
    least = min(parts, key=lambda branch: -1.0 if (share := parts[branch].share) is None else share)
    how = {one.how for one in parts.values()}
    texts = "; ".join(f"branch '{branch}': {one.text}" for branch, one in parts.items())
    return Kept(
        "measured" if how == {"measured"} else "estimated",
        parts[least].share,
        {f"{branch}: {name}": value for branch, one in parts.items() for name, value in one.classes.items()},
        {f"{branch}: {key}": value for branch, one in parts.items() for key, value in one.figures.items()},
        f"{len(parts)} branches, of which '{least}' kept least and counts. {capital(texts)}",
        parts[least].interval,
        tuple(note for one in parts.values() for note in one.notes),
    )


@torch.no_grad()
def estimated(
    pair: Pair,
    source: Source,
    datasets: Mapping[str, Dataset],
    data: DataConfig,
    accelerator: Accelerator,
    *,
    batch: int,
    sketch: Sketch | None = None,
) -> Kept:
    """Estimate the quality of the old classes from the agreement of the two models.

    For each old class, the agreement is the part of the deployed model's pixels of this class to which the new model
    gives the same class. The share is the mean agreement over the old classes. The background and classes with at most
    one pixel in ten thousand are left out.

    Agreement is not quality, and it is neither an upper nor a lower bound. A pixel that the deployed model got wrong
    counts as lost when its class changes, unless its label says that it is right now. A pixel that changes from
    background to an old class does not count at all. Pixels labelled as a new class are left out. Pixels labelled void
    or background are counted.

    The new images speak of the classes that they show. Of the others, and once more of these, the deployed model's
    stored features speak (`everseg.deploy.feature_sketch`): the part of a class's vectors, moved as the new images'
    features moved, that the new classifiers give to the same class. Where both are known the share of a class is the
    lower one.

    Args:
        sketch: those features; None = there are none.
    """
    matrix, images = ConfusionMatrix(pair.new.num_classes), list[Tensor]()
    windows = InputForm.of_config(data).windows(batch)
    usable = sketch is not None and can_sketch(pair.after, pair.branch)
    moved = Movement(sketch.features.shape[1]) if sketch is not None and usable else None
    for number, (image, label) in enumerate(_batches(source, datasets, data, batch, accelerator)):
        before, after = (
            through(m, pair.branch, image, accelerator, windows) for m in (pair.before, pair.after)
        )
        if moved is not None and number * batch < LOOKED:
            moved.add(*(cells(m, pair.branch, image) for m in (pair.before, pair.after)))
        # The deployed model cannot be right on pixels of a new class.
        taught = (label >= pair.old.num_classes) & (label != pair.new.ignored)
        # What the deployed model had wrong by the label, and the new one has right, is no loss.
        taught |= (label != pair.old.background) & (before != label) & (after == label)
        for one, other in zip(after.long(), before.long().masked_fill(taught, pair.new.ignored), strict=True):
            image_matrix = ConfusionMatrix(pair.new.num_classes)
            image_matrix.update(one, other)
            matrix.merge(image_matrix)
            images.append(image_matrix.sums)
    counts = matrix.counts.cpu().numpy()  # (C, C): rows = deployed model, columns = new model
    rows = counts.sum(1)[: pair.old.num_classes]
    often = [i for i in pair.classes if rows[i] > counts.sum() / 10_000]
    stays = {}
    if sketch is not None and moved is not None:
        stays = what_stays(pair.after, pair.branch, pair.old, sketch, moved)
    judged = sorted({*often, *stays})
    if not judged:
        return Kept(
            "estimated", None, {}, {},
            "old classes cannot be estimated: the deployed model finds none of them in the test images of the "
            "new data. --old-val DATA measures them",
        )  # fmt: skip
    agree, overlap = (values[: pair.old.num_classes] for values in (class_accuracy(counts), iou(counts)))
    # (classes,) of both sources; not a number where a source says nothing of a class
    seen, stored = (np.full(pair.old.num_classes, np.nan) for _ in range(2))
    seen[often] = agree[often]
    stored[[*stays]] = [one.kept / one.vectors for one in stays.values()]
    lower = np.fmin(seen, stored)
    classes = {
        name: {
            "agreement": _defined(agree[i]), "iou": _defined(overlap[i]), "pixels": int(rows[i]),
            **({"stored": _defined(stored[i])} if stays else {}),
            "share": _defined(lower[i]),
        }
        for i, name in enumerate(pair.old.names)
    }  # fmt: skip
    share = float(lower[judged].mean())
    figures = {}
    if often:
        figures = {
            "agreement": float(np.trace(counts) / counts.sum()),
            "class_agreement": float(agree[often].mean()),
            "agreement_miou": float(overlap[often].mean()),
            **_became(counts, pair),
        }
    if stays:
        figures["stored_agreement"] = float(np.nanmean(stored))
    # Each (RESAMPLES, classes), in pixels: what the deployed model calls so, and where the new one agrees.
    said, _, both = np.moveaxis(_draws(torch.stack(images).cpu().numpy()), 1, 0)[..., : pair.old.num_classes]
    drawn = np.divide(both, said, out=np.full(both.shape, np.nan), where=said > 0)
    drawn[:, np.isnan(seen)] = np.nan
    for i, one in stays.items():
        drawn[:, i] = np.fmin(drawn[:, i], vector_draws(one, RESAMPLES, i))
    between = _interval(defined_means(drawn[:, judged]))
    return Kept(
        "estimated",
        share,
        classes,
        figures,
        _estimate_text(pair, figures, share, between, often, judged),
        between,
    )


def _estimate_text(
    pair: Pair,
    figures: Mapping[str, float],
    share: float,
    between: tuple[float, float] | None,
    often: Sequence[int],
    judged: Sequence[int],
) -> str:
    """Say what an estimate is made of, and over which classes."""
    stored = figures.get("stored_agreement")
    if not often:
        return (
            "old classes estimated, not measured: the new images show none of them. Of the deployed model's stored "
            f"features, moved as those of the new images moved, {percent(share)} % in the mean{_between(between)} keep "
            f"their class, over {_judged(pair, judged)}"
        )
    text = (
        f"old classes estimated, not measured: the new model agrees with the deployed one on "
        f"{percent(figures['agreement'])} % of the pixels, and on {percent(figures['class_agreement'])} % in the mean"
        f"{_between(between) if stored is None else ''} over {_judged(pair, often)} "
        f"(mean IoU {percent(figures['agreement_miou'])}). "
    )
    if stored is not None:
        text += (
            f"Of its stored features, moved as those of the new images moved, {percent(stored)} % in the mean keep "
            f"their class. The lower figure of each class counts: {percent(share)} %{_between(between)} over "
            f"{_judged(pair, judged)}. "
        )
    return text + (
        "Of the pixels that the deployed "
        f"model gives to old classes, {percent(figures['became_new'])} % became a new class, "
        f"{percent(figures['became_old'])} % another old class and {percent(figures['became_background'])} % "
        "background. Not counted: pixels labelled as a new class, and those where the label and the new model agree. "
        "Where the two models differ, either may be right"
    )


def _draws(images: np.ndarray) -> np.ndarray:
    """Sum the counts per image, (N, 3, C), over the images of each draw: (RESAMPLES, 3, C)."""
    return resampled_sums(images, RESAMPLES, 0)


def _interval(draws: np.ndarray) -> tuple[float, float] | None:
    found = interval([draws])
    return None if found is None else (found[0], found[1])


def _between(found: tuple[float, float] | None) -> str:
    if found is None:
        return ""
    low, high = map(percent, found)
    return f" ({percent(LEVEL, digits=0)} % interval over the images {low} to {high})"


def _judged(pair: Pair, classes: Sequence[int]) -> str:
    """Say over how many of the old classes a mean is, and which are not in it."""
    rest = [pair.old.names[c] for c in pair.classes if c not in classes]
    without = f", without {some(rest, 12)}, which these images do not show" if rest else ""
    return f"{len(classes)} of {len(pair.classes)} old classes{without}"


def _became(counts: np.ndarray, pair: Pair) -> dict[str, float]:
    """Compute which part of the deployed model's pixels of old classes changed to which kind of class.

    Args:
        counts: numbers of pixels. Rows are the deployed model's classes, columns the new model's. The rows of
            `pair.classes` hold at least one pixel.

    Returns:
        `became_new`, `became_old` (another old class) and `became_background`: shares of those pixels, in [0, 1]. The
        other pixels kept their class.
    """
    # The new model's columns are the background, the old classes and, from `num_classes` of the old space on, new ones.
    rows = counts[pair.classes].astype(np.float64)
    total, background = rows.sum(), pair.old.background
    kept = float(np.trace(rows[:, pair.classes]))
    new = float(rows[:, pair.old.num_classes :].sum())
    empty = 0.0 if background is None else float(rows[:, background].sum())
    found = {"new": new, "old": float(rows.sum()) - kept - new - empty, "background": empty}
    return {f"became_{name}": value / total for name, value in found.items()}


@torch.no_grad()
def seen_in_background(
    model: SegmentationModel,
    space: LabelSpace,
    source: Source,
    datasets: Mapping[str, Dataset],
    data: DataConfig,
    accelerator: Accelerator,
    *,
    batch: int,
    images: int = LOOKED,
) -> dict[str, float]:
    """Find the old classes that the deployed model predicts where the new data label nothing.

    Returns:
        Class name -> share of the background pixels (of a model without background: of the ignored ones), largest
        first. Empty if there are none.
    """  # fmt: skip
    few = replace(source, indices=source.indices[:images])
    counts = np.zeros(space.num_classes, np.int64)
    windows = InputForm.of_config(data).windows(batch)
    for image, label in _batches(few, datasets, data, batch, accelerator):
        ids = through(model.to(accelerator.device), source.branch, image, accelerator, windows)
        found = ids[label == (source.ignored if space.background is None else space.background)]
        counts += np.bincount(found.cpu().numpy(), minlength=space.num_classes)
    shares = counts / max(1, counts.sum())
    order = sorted(range(space.num_classes), key=lambda i: -shares[i])
    return {space.names[i]: float(shares[i]) for i in order if i != space.background and shares[i] > 0}


@torch.no_grad()
def fit(
    model: SegmentationModel,
    source: Source,
    space: LabelSpace,
    datasets: Mapping[str, Dataset],
    data: DataConfig,
    accelerator: Accelerator,
    *,
    batch: int,
    images: int = LOOKED,
) -> float:
    """Say how well a branch labels some images: the mean IoU of the classes that these label.

    Args:
        source: the images, through the branch. The first few are used.
        space: the branch's classes.
    """
    few = replace(source, indices=source.indices[:images])
    matrix = ConfusionMatrix(space.num_classes)
    windows = InputForm.of_config(data).windows(batch)
    for image, label in _batches(few, datasets, data, batch, accelerator):
        ids = through(model.to(accelerator.device), source.branch, image, accelerator, windows)
        matrix.update(ids.long(), label.long())
    labelled = [c for c in set(source.lut) if c < space.num_classes and c != space.background]
    return _mean(iou(matrix.counts.cpu().numpy())[labelled])


def _batches(
    source: Source, datasets: Mapping[str, Dataset], data: DataConfig, size: int, accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor]]:
    views = views_of([source], datasets)
    for _, batch in normalised_batches(views, data, accelerator.device, batch=size):
        yield batch.image, batch.label


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
