"""Make the qualitative grid: predictions of every step's model on test images.

The report states the rule that chose the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everseg.config.fields import DataConfig, ModelConfig, TrainConfig
from everseg.data.base import Dataset
from everseg.data.batches.loader import normalised_batches
from everseg.data.channels import picture_of
from everseg.data.class_colours import SAFE, palette
from everseg.display import counted, in_percent, percent
from everseg.distributed import derive_seed
from everseg.errors import CheckpointError, DataError, EversegError, first_line, some
from everseg.inference.count import user_builder, views_of
from everseg.labels import IGNORED, IGNORED_WIDE
from everseg.losses.reading import read_ids
from everseg.metrics import ConfusionMatrix, mean_iou
from everseg.progress import Progress
from everseg.reports.embedded import coloured, labels, photo, plot, stored_picture
from everseg.reports.kinds import Words
from everseg.reports.page import Grid, Picture, PictureRow, Place
from everseg.reports.verdict import alternation
from everseg.runs.commit import read_document
from everseg.runs.documents import DRIFT
from everseg.runs.results import Results, StepResults, Track
from everseg.scenarios.steps import Source

KINDS = ("worst", "median", "best", "random")


@dataclass
class Looked:
    """One test image with the predictions of each step's model."""

    name: str
    """Of the results it belongs to: the domain or branch."""
    id: str
    image: np.ndarray
    """(H, W, 3) uint8, as the model saw it."""
    label: np.ndarray
    """(H, W) train ids, 255 = ignored."""
    predictions: dict[int, np.ndarray] = field(default_factory=dict)
    """Step -> (H, W) train ids; a step that did not know the image's branch is missing."""
    score: float | None = None
    """Mean IoU, over this image alone, of the classes that rank the pictures."""
    kind: str = ""
    deployed: int | None = None
    """Of an extension: the step that holds the deployed model."""
    old: int | None = None
    """Of an extension by new classes: number of outputs of the deployed model. The image need not label these."""
    background: int | None = None
    """Train id of the background."""

    @property
    def last(self) -> np.ndarray:
        """What the last model predicts."""
        return self.predictions[max(self.predictions)]


def drawn(sources: Sequence[Source], images: int, seed: int) -> list[Source]:
    """Draw at most a given number of images with the seed, evenly over the sources, and keep their order."""
    each = max(1, images // max(1, len(sources)))
    result = []
    for source in sources:
        count = min(each, len(source.indices))
        stream = np.random.default_rng(derive_seed(seed, "report", source.name, source.split))
        chosen = np.sort(stream.choice(len(source.indices), count, replace=False)).tolist()
        result.append(replace(source, indices=tuple(source.indices[i] for i in chosen)))
    return [source for source in result if source.indices]


def look(
    results: Results,
    data: DataConfig,
    train: TrainConfig,
    sources: Sequence[Source],
    datasets: Mapping[str, Dataset],
    steps: Sequence[int],
    *,
    builder: Any = None,
    shown: Callable[[int], None] = lambda done: None,
) -> list[Looked]:
    """Predict the images of the sources with the model of each step.

    Args:
        steps: finished steps, ascending.
        builder: the user's own architecture, if the run has one.
        shown: called with the number of images done, over all steps.

    Raises:
        EversegError: a model or an image that cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data.model_copy(update={"workers": 0})
    half = train.precision == "bf16"
    found: dict[tuple[str, int], Looked] = {}
    done = 0
    start = started_with(results)
    last = results.steps[-1].spaces
    known = {
        branch: space.num_classes
        for branch, space in (StepResults(results.folder, start).spaces if start is not None else {}).items()
        if branch in last and space.num_classes < last[branch].num_classes
    }
    for index in steps:
        # The copy of the bundle that the run began with is no finished step of it.
        step = StepResults(results.folder, index) if index == start else results.step(index)
        model = (step.model(builder) if index == start else results.model(index, builder)).to(device)
        for source in sources:
            position = 0
            if source.branch not in step.spaces or (step.is_fresh and source.name not in step.branch_of):
                continue
            for loaded, batch in normalised_batches(
                views_of([source], datasets, model.reads_extra), data, device, batch=train.eval_batch
            ):
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                    maps = {"extra": batch.extra} if model.reads_extra else {}
                    output = model(batch.image, (source.branch,), **maps)[source.branch]
                found_ids = read_ids(output, model.readout, batch.image.shape[-2:])
                ids = found_ids.cpu().numpy().astype(loaded.label.numpy().dtype, copy=False)
                for one in range(len(loaded.ids)):
                    entry = found.setdefault(
                        (source.name, position),
                        Looked(
                            source.name,
                            loaded.ids[one],
                            picture_of(loaded.image[one].permute(1, 2, 0).numpy(), loaded.channels).copy(),
                            loaded.label[one].numpy().copy(),
                            deployed=start,
                            old=known.get(source.branch),
                            background=step.spaces[source.branch].background,
                        ),
                    )
                    entry.predictions[step.index] = ids[one]
                    position += 1
                    done += 1
                    shown(done)
    return list(found.values())


def started_with(results: Results) -> int | None:
    """Index of the step that holds the deployed model, if the run extends one: the step before its first."""
    extends = results.config.scenario.bundle is not None and results.steps[0].index > 0
    return results.steps[0].index - 1 if extends else None


def choose(
    looked: Sequence[Looked],
    ranked: Mapping[str, Sequence[int]],
    classes: Mapping[str, int],
    each: int,
    seed: int,
) -> list[Looked]:
    """Choose, for each name, the worst, median and best images by the last step's score, and some at random.

    Args:
        ranked: name -> train ids that the score averages over; classes without a true pixel in an image are left out.
        classes: name -> number of classes.
        each: images per kind and name.
        seed: of the draw.

    Returns:
        The chosen images with `score` and `kind`, in the order of KINDS. Images without any of the classes are not
        candidates, and no image is chosen twice.
    """
    chosen = []
    for name in dict.fromkeys(one.name for one in looked):
        mine = [one for one in looked if one.name == name and one.predictions]
        for one in mine:
            one.score = image_score(one, ranked[name], classes[name])
        best_last = sorted(
            (one for one in mine if one.score is not None), key=lambda one: (one.score or 0.0, one.id)
        )
        middle = (len(best_last) - each) // 2
        picks = {
            "worst": best_last[:each],
            "median": best_last[max(middle, 0) :][:each],
            "best": best_last[::-1][:each],
        }
        taken: list[Looked] = []
        for kind, ones in picks.items():
            for one in ones:
                if not any(one is other for other in taken):
                    one.kind = kind
                    taken.append(one)
        rest = [one for one in best_last if not any(one is other for other in taken)]
        stream = np.random.default_rng(derive_seed(seed, "report", name))
        for position in sorted(stream.choice(len(rest), min(each, len(rest)), replace=False).tolist()):
            rest[position].kind = "random"
            taken.append(rest[position])
        chosen += taken
    return chosen


def image_score(one: Looked, classes: Sequence[int], number: int, step: int | None = None) -> float | None:
    """Mean IoU of some classes in one image, as a fraction; None if none has a true pixel.

    Of an extension it is the mean over the new classes and everything else together, whichever `classes` are given. So
    an image without a new class has a score too, which falls with every pixel that is called so.

    Args:
        step: whose model predicts; default the last one's.
    """
    matrix = ConfusionMatrix(number)
    last, label = one.last if step is None else one.predictions[step], one.label
    if one.old is not None:
        last, label = (np.where(ids < one.old, 0, ids).astype(ids.dtype) for ids in (last, label))
        classes = [0, *range(one.old, number)]
    matrix.update(torch.from_numpy(last)[None], torch.from_numpy(label)[None])
    value = mean_iou(matrix.counts, classes)
    return None if np.isnan(value) else value


CHANGES = ("right", "forgotten", "learnt", "wrong", "ignored")
CHANGE_COLOURS = ((226, 230, 234), (213, 94, 0), (0, 114, 178), (110, 116, 124), (255, 255, 255))


def change(one: Looked) -> np.ndarray:
    """Classify how every pixel changed over the steps, as positions in CHANGES, (H, W) uint8.

    forgotten: right after some earlier step, wrong after the last. learnt: right only after the last. wrong: wrong
    after every step. ignored: not labelled. With a single step a pixel is right or wrong. In an extension a background
    pixel may show an old class, so it is not judged unless the last model calls it a new one.
    """
    *earlier, last = sorted(one.predictions)
    right = one.predictions[last] == one.label
    was = right if not earlier else np.any([one.predictions[step] == one.label for step in earlier], axis=0)
    result = np.full(one.label.shape, CHANGES.index("wrong"), np.uint8)
    result[was & right] = CHANGES.index("right")
    result[was & ~right] = CHANGES.index("forgotten")
    result[~was & right] = CHANGES.index("learnt")
    if one.old is not None and one.background is not None:
        result[(one.label == one.background) & (one.last < one.old)] = CHANGES.index("ignored")
    result[one.label == (IGNORED if one.label.dtype == np.uint8 else IGNORED_WIDE)] = CHANGES.index("ignored")
    return result


MOST_COLUMNS = 4
"""Most steps shown in the grid. Of more steps, it shows the first, the last and some between."""


def looked(
    results: Results,
    data: DataConfig,
    train: TrainConfig,
    tests: Sequence[Source],
    datasets: Mapping[str, Dataset],
    progress: Progress,
    notes: list[str],
    *,
    model: ModelConfig,
    images: int,
    seed: int,
) -> list[Looked]:
    """Draw test images with the run's seed and predict them with the steps' models; [] and a note if that fails.

    Args:
        data: how images are brought to the networks.
        train: the batch of tests, and their precision.
        tests: sources that the last step is tested on.
        datasets: the data of these sources.
        model: which says whether the architecture is the user's own.
        images: maximum number of images to draw.
    """
    if images < 1:
        notes.append("Made without pictures.")
        return []
    sources = drawn(tests, images, seed)
    start = started_with(results)
    steps = [*([] if start is None else [start]), *shown_steps(results.finished)]
    progress.begin("pictures for the report", len(steps) * sum(len(s.indices) for s in sources))
    try:
        return look(
            results, data, train, sources, datasets, steps, builder=user_builder(model),
            shown=lambda done: progress.update(done),
        )  # fmt: skip
    except EversegError as error:
        notes.append(f"There are no pictures: {error}")
        return []
    finally:
        progress.end()


def shown_steps(finished: Sequence[int]) -> list[int]:
    """Choose the steps to show: all up to MOST_COLUMNS, else the first, the last and some evenly between."""
    if len(finished) <= MOST_COLUMNS:
        return list(finished)
    return [finished[i] for i in np.linspace(0, len(finished) - 1, MOST_COLUMNS).round().astype(int)]


def rule(found: Sequence[Looked], seed: int, words: Words) -> str:
    """Describe how the pictures were chosen."""
    steps = ", ".join(map(str, sorted({step for one in found for step in one.predictions})))
    start = (
        f"Chosen by rule, not by hand: {counted(len(found), 'test image', 'was', 'were')} drawn with seed {seed} "
        "and predicted with "
        f"{words.models.format(steps=steps)}."
    )
    if any(one.old is not None for one in found):
        by = (
            "Each image is ranked by its mean IoU over the new classes and everything else together, so images without "
            "a new class count too."
        )
    else:
        by = (
            "Each image is ranked by its mean IoU with the last model over the classes that it shows, old and new "
            "alike; background does not count. Below each prediction stands its mean IoU over the classes that its "
            "model knew."
        )
    return (
        f"{start} {by} The worst, the median and the best image are shown, then some of the rest, drawn with the same "
        "seed. Choose a picture to enlarge it."
    )


def ranked_over(track: Track) -> list[int]:
    """Find the train ids of the classes that rank the pictures: all but the background, unless it is the only one."""
    every = range(track.space.num_classes)
    return [c for c in every if c != track.background] or list(every)


def ranking_text(track: Track, extends: bool = False) -> str:
    """Describe which classes rank the pictures of a domain or branch."""
    if extends:
        new = some(track.group_names(len(track.space.groups) - 1), 20)
        return (
            f"Ranked over {new} and everything else together. Background pixels may show old classes, so they are not "
            "judged unless they are called a new class."
        )
    parts = _old_and_new(track)
    told = "; ".join(
        f"{name}{': ' if name else ''}{some([track.space.names[c] for c in ids], 20)}" for name, ids in parts
    )
    return f"Ranked over {told}."


def _old_and_new(track: Track) -> list[tuple[str, list[int]]]:
    """Part the classes that rank the pictures into old and new ones; one part without a name where none is old."""
    ranked, old = ranked_over(track), set(track.old)
    parts = [("old", [c for c in ranked if c in old]), ("new", [c for c in ranked if c not in old])]
    found = [(name, ids) for name, ids in parts if ids]
    return found if len(found) > 1 else [("", ranked)]


def grids(found: Sequence[Looked], tracks: Sequence[Track], side: int, rows: int, seed: int) -> list[Grid]:
    """Make grids of the chosen images with the predictions of every step's model.

    Args:
        side: longer side of the pictures in pixels.
        rows: images per kind; always 1 if there are several domains.
    """
    known = {track.name: track for track in tracks}
    found = [one for name in known for one in found if one.name == name]  # domains in the order of the tracks
    each = rows if len({one.name for one in found}) == 1 else 1
    ranked = {name: ranked_over(track) for name, track in known.items()}
    sizes = {name: t.space.num_classes for name, t in known.items()}
    chosen = choose(found, ranked, sizes, each, seed)
    steps = sorted({step for one in found for step in one.predictions})
    result = []
    for name in dict.fromkeys(one.name for one in chosen):
        mine = [one for one in chosen if one.name == name]
        present = sorted(
            {c for one in mine for ids in (one.label, *one.predictions.values()) for c in np.unique(ids)}
        )
        space = known[name].space
        colours = palette(space.num_classes, background=space.background)
        numbered = space.num_classes > SAFE
        legend = [
            (css(colours[c]), f"{c} {space.names[c]}" if numbered else space.names[c])
            for c in present
            if c < space.num_classes
        ]
        track, extends = known[name], any(one.old is not None for one in mine)
        start = mine[0].deployed
        last = f"after step {steps[-1]}" if len(steps) > 1 else "prediction"
        if start is not None:
            last = "extended model" if extends else "refined model"
        titles = [
            last if step == steps[-1] else "deployed model" if step == start else f"after step {step}"
            for step in steps
        ]
        heads = ["image", "truth", *titles, "change"]
        rows_shown = [_row(one, steps, side, track) for one in mine]
        result.append(
            Grid(name if len(known) > 1 else "", heads, rows_shown, legend, ranking_text(track, extends))
        )
    return result


def alternating(found: Sequence[Looked]) -> dict[str, float]:
    """Map each domain or branch to the share of pixels that alternate like a checkerboard with the last model.

    It is the mean over its images, beyond what their labels have, at the distance of 1, 2 or 4 pixels that has most.
    """
    result = {}
    for name in dict.fromkeys(one.name for one in found):
        mine = [one for one in found if one.name == name and one.predictions]
        each = [[alternation(one.last, k) - alternation(one.label, k) for one in mine] for k in (1, 2, 4)]
        if mine:
            result[name] = max(0.0, *(float(np.mean(values)) for values in each))
    return result


def _row(one: Looked, steps: Sequence[int], side: int, track: Track) -> PictureRow:
    names = track.space.names if track.space.num_classes > SAFE else ()
    background = track.space.background
    shown: list[Picture | None] = [
        Picture(photo(one.image, side), f"test image {one.id}", photo=max(one.image.shape[:2]) >= side),
        Picture(
            labels(one.label, side, background=background),
            f"true classes of {one.id}",
            places=places(one.label, names),
        ),
    ]
    for step in steps:
        ids = one.predictions.get(step)
        text = f"classes of {one.id} after step {step}"
        note = _note(one, track, step)
        shown.append(
            None
            if ids is None
            else Picture(labels(ids, side, background=background), text, note=note, places=places(ids, names))
        )
    shown.append(
        Picture(coloured(change(one), side, CHANGE_COLOURS), f"what changed in {one.id} over the steps")
    )
    for picture in filter(None, shown):
        picture.shape = round(one.label.shape[1] / one.label.shape[0], 3)
    return PictureRow(one.kind.capitalize(), " · ".join([one.id, *_scores(one, track)]), shown)


def _note(one: Looked, track: Track, step: int) -> str:
    """Say what one step's model reaches in the image, over the classes that it knew; "" where that means nothing."""
    if one.old is not None or step not in one.predictions or step not in track.steps:
        return ""
    known = track.spaces[track.steps.index(step)].num_classes
    classes = [c for c in ranked_over(track) if c < known]
    value = image_score(one, classes, track.space.num_classes, step)
    return "" if value is None else f"mIoU {percent(value)}"


_GRAIN = 64
"""Pixels of the longer side on which the middle of a region is looked for."""
_LEAST_AREA = 0.006
"""Smallest share of a picture that a region's class must have to be numbered."""


def places(ids: np.ndarray, names: Sequence[str]) -> list[Place]:
    """Find where the number of each class is written on a picture: in the middle of the thickest part of its regions.

    Args:
        ids: (H, W) train ids.
        names: of the classes; () = no numbers, as where colours tell all classes apart.
    """
    coarse = ids[:: -(-max(ids.shape) // _GRAIN), :: -(-max(ids.shape) // _GRAIN)]
    found = []
    for c in np.unique(coarse).tolist() if names else ():
        inside = coarse == c
        if c >= len(names) or inside.mean() < _LEAST_AREA:
            continue
        while inside.any():  # peel until nothing is left: what goes last lies deepest
            last = inside
            padded = np.pad(inside, 1)
            inside = (
                padded[1:-1, 1:-1]
                & padded[:-2, 1:-1]
                & padded[2:, 1:-1]
                & padded[1:-1, :-2]
                & padded[1:-1, 2:]
            )
        rows, columns = np.nonzero(last)
        row, column = rows[len(rows) // 2], columns[len(rows) // 2]
        height, width = coarse.shape
        found.append(
            Place(
                left=(int(column) + 0.5) / width,
                top=(int(row) + 0.5) / height,
                text=str(c),
                name=names[c],
            )
        )
    return found


def _scores(one: Looked, track: Track) -> list[str]:
    """Say how well the last model does on one image: over old and over new classes apart, each with its classes."""
    if one.score is None:
        return []
    if one.old is not None:
        return [f"mean IoU {percent(one.score)} over the new classes and everything else"]
    said = []
    for name, ids in _old_and_new(track):
        shown = some([track.space.names[c] for c in ids if (one.label == c).any()], 6)
        value = percent(image_score(one, ids, track.space.num_classes)) if shown else ""
        over = f"{name} classes" if name else "classes"
        said.append(f"{over} {value} ({shown})" if shown else f"no {over} in it")
    return [f"mean IoU {percent(one.score)}", *said] if len(said) > 1 else [f"mean IoU of {said[0]}"]


def change_legend(words: Words) -> list[tuple[str, str]]:
    """Explain the colours of the last column that this kind of run can have."""
    return [(css(colour), text) for colour, text in zip(CHANGE_COLOURS, words.changes, strict=True) if text]


def css(colour: Sequence[int]) -> str:
    """Write RGB values 0 ... 255 as a CSS colour."""
    return f"rgb({', '.join(str(int(value)) for value in colour)})"


@dataclass(frozen=True)
class StoredFeatures:
    """The files that `everseg features` wrote to a run folder for one pair of steps."""

    title: str
    pictures: Mapping[str, np.ndarray]
    """File name -> (H, W, 3) uint8."""
    rows: list[dict[str, Any]]


def stored_features(run: Path, notes: list[str]) -> list[StoredFeatures]:
    """Read the plots and numbers of `everseg features` from a run folder.

    Args:
        notes: gets a line about every file that is damaged or lies elsewhere, and is left out.
    """
    found = []
    for path in sorted((run / "features").glob("*/drift.json")):
        try:
            stored = read_document(path, shape=DRIFT, root=run)
            pictures = {name: stored_picture(path.parent, name) for name in stored["pictures"]}
        except (CheckpointError, DataError) as error:
            notes.append(f"The features of {path.parent.name} are left out: {first_line(error)}")
            continue
        title = f"Step {stored['before']} against step {stored['after']}"
        found.append(StoredFeatures(title, pictures, [_drift_row(row) for row in stored["classes"]]))
    return found


def features(stored: Sequence[StoredFeatures], side: int) -> list[dict[str, Any]]:
    """Prepare stored features for the page; the longer side of their pictures is at most `side` pixels."""
    return [
        {
            "title": one.title,
            "pictures": [
                Picture(
                    plot(pixels, side),
                    f"{name.removesuffix('.png').replace('_', ' by ')}: {one.title}; the numbers stand below",
                )
                for name, pixels in one.pictures.items()
            ],
            "rows": one.rows,
        }
        for one in stored
    ]


def _drift_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "domain": row["domain"],
        "class": row["class_name"],
        "pixels": row["pixels"],
        "drift of the centre / spread": row["relative"],
        "nearest-centre accuracy before": in_percent(row["accuracy_before"]),
        "after": in_percent(row["accuracy_after"]),
    }
