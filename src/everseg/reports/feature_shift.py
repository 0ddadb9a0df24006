"""`everseg features`: how a step changed the encoder's features, as tables and pictures."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from everseg.config.fields import DataConfig, RunConfig
from everseg.data.batches.loader import normalised_batches
from everseg.data.class_colours import palette
from everseg.display import (
    OnceADictionary,
    Picture,
    Piece,
    Table,
    counted,
    figure,
    for_csv,
    percent,
    printable,
    table,
)
from everseg.distributed import derive_seed
from everseg.engine.prepare import Prepared, prepare
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.inference.count import user_builder, views_of
from everseg.labels import LabelSpace, find_name, spelling
from everseg.metrics import defined_mean
from everseg.models.model import SegmentationModel
from everseg.progress import Progress
from everseg.runs.commit import write_bytes, write_json, writing
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class FeatureDrift(OnceADictionary):
    """How a step changed the encoder's features: tables, and pictures that a notebook shows."""

    run: str
    """Name of the run."""
    before: int
    """The earlier step."""
    after: int
    """The later step."""
    features: str
    """Whose features: the tap's name."""
    channels: int
    seed: int
    """Of the draws and of t-SNE."""
    branches: Mapping[str, str]
    """Domain -> branch its images went through."""
    classes: tuple[Drift, ...]
    """One row per domain and class."""
    means: Mapping[str, Mapping[str, float | None]]
    """Domain -> unweighted means over its classes, by the names of `Drift`'s numbers."""
    left_out: tuple[str, ...]
    """Branches that the earlier model did not have."""
    pictures: tuple[str, ...]
    """Names of the PNGs in `path`."""
    path: Path
    """Folder with the pictures, drift.csv and drift.json."""

    def shown(self) -> Iterator[Piece]:
        yield self.table()
        yield f"{', '.join(self.pictures)}, drift.csv and drift.json in {self.path}"
        for name in self.pictures:
            yield Picture((self.path / name).read_bytes, name)

    def table(self) -> Table:
        """Make one row per domain and class, and one with the mean over the classes of each domain."""
        numbers = ["pixels", "distance", "of spread", "cosine", "accuracy before", "after", "falls by"]
        rows: list[list[object]] = []
        for domain, mean in self.means.items():
            mine = [row for row in self.classes if row.domain == domain]
            for row in mine:
                name = f"{row.class_name} (new)" if row.new else row.class_name
                rows.append([domain, name, row.pixels, *_cells(asdict(row))])
            rows.append([domain, "mean of classes", sum(row.pixels for row in mine), *_cells(mean)])
        title = (
            f"{self.run}: drift of the class centres from step {self.before} to step {self.after} "
            "(encoder features of the same pixels; accuracy in percent of the nearest centre before)"
        )
        return table(["domain", "class", *numbers], rows, title=title, right="|".join(numbers))

    def to_json(self) -> dict[str, Any]:
        return {**self.stored(), "path": str(self.path)}

    def stored(self) -> dict[str, Any]:
        """The content of drift.json."""
        whole = asdict(self)
        del whole["path"]
        return {**whole, **{key: list(whole[key]) for key in ("classes", "left_out", "pictures")}}


def write_features(
    folder: RunFolder,
    config: RunConfig,
    *,
    before: int | None = None,
    after: int | None = None,
    out: Path | None = None,
    limit: int = 200,
    images: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> FeatureDrift:
    """Compare the encoder's features after two steps of a run on the later step's test images; write tables and PNGs.

    Args:
        config: the run's configuration; its data may have moved to another folder.
        before: earlier finished step; default the one before `after`.
        after: later finished step; default the last one.
        out: folder for the files; default RUN/features/before-K-after-L.
        limit: most pixels per class and domain.
        images: maximum number of images per source; they are drawn with the seed.
        seed: of the draws and of t-SNE.

    Raises:
        ConfigError: steps not finished or in the wrong order, no common branch, matplotlib or scikit-learn missing.
        DataError: the data have other classes than the run had.
    """
    before, after = _checked(folder, before, after, limit, images)
    progress = progress or Progress(quiet=True)
    spaces, known = folder.spaces(after), folder.spaces(before)
    left_out = _left_out(folder, before, after)
    if left_out:
        progress.message(f"note: left out, not known yet after step {before}: {', '.join(left_out)}")
    prepared = prepare(config.data, config.scenario, progress, seed=config.seed)
    step = next((step for step in prepared.steps if step.index == after), None)
    if step is None or dict(step.spaces) != spaces:
        raise DataError(f"the data have other classes now than when {folder.path} was trained; restore them")
    sources = [_some_images(s, images, seed) for s in step.test if s.branch in known]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    builder = user_builder(config.model)
    first, second = (folder.load_final(index, builder)[0].to(device) for index in (before, after))
    progress.begin(f"features of steps {before} and {after}", sum(len(s.indices) for s in sources))
    pixels = draw_pixels(
        (first, second),
        sources,
        spaces,
        lambda source: _batches(source, prepared, config.data, config.train.eval_batch, device),
        limit=limit,
        seed=seed,
        shown=lambda done: progress.update(done),
    )
    progress.end()
    progress.message(f"projecting {counted(len(pixels.label), 'pixel')}")
    empty = (space.names[space.background] for space in spaces.values() if space.background is not None)
    found = (find_name(name, pixels.classes) for name in empty)
    background = next((pixels.classes.index(name) for name in found if name is not None), None)
    files = pictures(pixels, run=config.name, steps=(before, after), seed=seed, background=background)
    branches = {source.name: source.branch for source in sources}
    rows = class_drift(pixels)
    result = FeatureDrift(
        run=config.name,
        before=before,
        after=after,
        features=TAP,
        channels=pixels.before.shape[1],
        seed=seed,
        branches=branches,
        classes=tuple(
            replace(row, new=find_name(row.class_name, known[branches[row.domain]].names) is None)
            for row in rows
        ),
        means={
            domain: mean_drift([row for row in rows if row.domain == domain])
            for domain in dict.fromkeys(row.domain for row in rows)
        },
        left_out=tuple(left_out),
        pictures=tuple(files),
        path=out or folder.path / "features" / f"before-{before}-after-{after}",
    )
    _write(result, files)
    return result


def _checked(
    folder: RunFolder, before: int | None, after: int | None, limit: int, images: int
) -> tuple[int, int]:
    """Find the two steps, and check the whole request before any work. One error lists every problem."""
    problems = []
    finished = folder.finished_steps
    after = finished[-1] if after is None and finished else after or 0
    before = max(after - 1, 0) if before is None else before
    listing = ", ".join(map(str, finished)) or "none yet"
    if len(finished) < 2 or {before, after} - set(finished):
        problems.append(
            f"--before {before} --after {after}: two finished steps are needed; those of {folder.path} are {listing}"
        )
    elif before >= after:
        problems.append(f"--before {before} --after {after}: the first must be the earlier step")
    problems += [
        f"--{name} {value}: at least 1 is expected"
        for name, value in (("pixels", limit), ("images", images))
        if value < 1
    ]
    for package in ("matplotlib", "sklearn"):
        try:
            importlib.import_module(package)
        except ImportError:
            problems.append(f"features need {package}: pip install 'everseg[plot]'")
    if problems:
        raise ConfigError(problems)
    return before, after


def _left_out(folder: RunFolder, before: int, after: int) -> list[str]:
    """Find the branches that only the later step has. An error if the two steps have no branch in common."""
    known, spaces = folder.spaces(before), folder.spaces(after)
    left_out = [branch for branch in spaces if branch not in known]
    if len(left_out) == len(spaces):
        raise ConfigError(
            f"steps {before} and {after} of {folder.path} have no branch in common: "
            f"they know {', '.join(known)} and {', '.join(spaces)}"
        )
    return left_out


def _some_images(source: Source, most: int, seed: int) -> Source:
    """Draw at most a given number of images, and keep their order."""
    if len(source.indices) <= most:
        return source
    stream = np.random.default_rng(derive_seed(seed, source.name, source.split))
    drawn = np.sort(stream.choice(len(source.indices), most, replace=False))
    return replace(source, indices=tuple(source.indices[i] for i in drawn.tolist()))


def _batches(
    source: Source, prepared: Prepared, data: DataConfig, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Sequence[str]]]:
    """Batches of a source's images, prepared as in testing."""
    views = views_of([source], prepared.datasets)
    for loaded, batch in normalised_batches(views, data, device, batch=size):
        yield batch.image, loaded.label, loaded.ids


def _write(result: FeatureDrift, files: Mapping[str, bytes]) -> None:
    text, target = io.StringIO(), result.path
    writer = csv.DictWriter(text, [field.name for field in fields(Drift)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: for_csv(value) for key, value in asdict(row).items()} for row in result.classes)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(target / name, data)
    write_bytes(target / "drift.csv", text.getvalue().encode())
    write_json(target / "drift.json", result.stored())


def _cells(row: Mapping[str, Any]) -> list[str]:
    values = [row[key] for key in ("distance", "relative", "cosine")]
    before, after = row["accuracy_before"], row["accuracy_after"]
    return [
        *(figure(value, digits=3) for value in values),
        *(percent(value) for value in (before, after, before - after)),
    ]


TSNE_PIXELS = 2500
"""Most pixels that t-SNE shows. Its time grows faster than their number."""
_SEED = 0x66656174
_LONGEST_NAME = 24
_LEGEND_WIDTH = 125
"""Letters in a line of the legend."""


@dataclass(frozen=True)
class Projection:
    """Features projected to two dimensions."""

    title: str
    before: np.ndarray
    """(Q, 2)."""
    after: np.ndarray
    """(Q, 2), the same pixels."""
    chosen: np.ndarray
    """(Q,) int64, positions of these pixels in `Pixels`."""
    axes: tuple[str, str]
    linear: bool
    """A centre in the plane is the projected centre."""


def pca(pixels: Pixels) -> Projection:
    """Project both sets of features on the two principal components of the features before the step."""
    from sklearn.decomposition import PCA

    fitted = PCA(2, random_state=0).fit(pixels.before)
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(fitted.explained_variance_ratio_).tolist()
    return Projection(
        "PCA fitted on the features before; large dots: centres, lines: from where they were",
        fitted.transform(pixels.before),
        fitted.transform(pixels.after),
        np.arange(len(pixels.label)),
        (
            f"component 1 ({percent(shares[0], digits=0)} % of the variance)",
            f"component 2 ({percent(shares[1], digits=0)} %)",
        ),
        linear=True,
    )


def tsne(pixels: Pixels, *, seed: int, most: int = TSNE_PIXELS) -> Projection:
    """Compute one t-SNE map of the features before and after together. The result depends only on the arguments.

    Args:
        most: maximum number of pixels. If there are more, each class and domain keeps at most the same number.
    """
    from sklearn.manifold import TSNE

    groups = [at for _, _, at in pixels.groups()]
    each = max(map(len, groups))
    while each > 1 and sum(min(len(at), each) for at in groups) > most:
        each -= 1
    chosen = np.concatenate([at[:each] for at in groups])
    both = np.concatenate([pixels.before[chosen], pixels.after[chosen]])
    perplexity = min(30.0, (len(both) - 1) / 3)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(both)
    before, after = flat[: len(chosen)], flat[len(chosen) :]
    return Projection("t-SNE of both together", before, after, chosen, ("t-SNE 1", "t-SNE 2"), linear=False)


def pictures(
    pixels: Pixels, *, run: str, steps: tuple[int, int], seed: int, background: int | None
) -> dict[str, bytes]:
    """Draw file name -> PNG: both projections, coloured by class and, if there are several domains, by domain.

    Args:
        run: name for the titles.
        steps: before and after.
        seed: of t-SNE.
        background: index of the background in the pixels' classes, None if there is none.
    """
    colourings = {
        "class": (pixels.label, pixels.classes, palette(len(pixels.classes), background=background))
    }
    if len(pixels.domains) > 1:
        colourings["domain"] = (pixels.domain, pixels.domains, palette(len(pixels.domains), background=None))
    files = {}
    for kind, flat in (("pca", pca(pixels)), ("tsne", tsne(pixels, seed=seed))):
        for what, (groups, names, colours) in colourings.items():
            number = counted(len(flat.chosen), "pixel")
            title = f"{printable(run)}: encoder features of {number} by {what}\n{flat.title}"
            figure = _figure(flat, groups[flat.chosen], names, colours / 255, title, steps)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            files[f"{kind}_{what}.png"] = buffer.getvalue()
    return files


def _figure(
    flat: Projection,
    groups: np.ndarray,
    names: Sequence[str],
    colours: np.ndarray,
    title: str,
    steps: tuple[int, int],
) -> Figure:
    """Draw two square panels with the same axes, and a legend of the groups below.

    Args:
        groups: (Q,) index of each pixel's name and colour.
        colours: one RGB in [0, 1] per name.
    """
    from matplotlib.figure import Figure

    shown = {group: _short(names[group]) for group in np.unique(groups).tolist()}
    columns = min(len(shown), 5, _LEGEND_WIDTH // (max(map(len, shown.values())) + 6))
    figure = Figure(figsize=(12, 7 + 0.28 * -(-len(shown) // columns)), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=15, parse_math=False)
    points = np.concatenate([flat.before, flat.after])
    middle = (points.min(0) + points.max(0)) / 2
    half = 0.53 * max(float(np.ptp(points, axis=0).max()), 1e-6)
    panels: list[Axes] = list(figure.subplots(1, 2))
    for panel, where, step, name in zip(
        panels, (flat.before, flat.after), steps, ("before", "after"), strict=True
    ):
        order = np.random.default_rng(_SEED).permutation(len(where))  # so that no class hides the others
        x, y = where[order].T
        panel.scatter(x, y, c=colours[groups[order]], s=14, alpha=0.75, linewidths=0)
        if flat.linear:
            _centres(panel, flat.before, where, groups, colours)
        panel.set_title(f"{name}: step {step}", fontsize=14)
        panel.set_xlabel(flat.axes[0], fontsize=12)
        panel.set_ylabel(flat.axes[1], fontsize=12)
        panel.set_xlim(middle[0] - half, middle[0] + half)
        panel.set_ylim(middle[1] - half, middle[1] + half)
        panel.set_box_aspect(1)
        panel.grid(color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    _legend(figure, shown, colours, columns)
    return figure


def _legend(figure: Figure, shown: Mapping[int, str], colours: np.ndarray, columns: int) -> None:
    """Draw a dot and a name per group, below the panels."""
    from matplotlib.lines import Line2D

    dots = [
        Line2D([], [], linestyle="", marker="o", markersize=9, color=tuple(colours[group])) for group in shown
    ]
    legend = figure.legend(
        dots, [str(group) for group in shown], loc="outside lower center", ncols=columns, fontsize=12,
        frameon=False,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), shown.values(), strict=True):
        text.set_text(name)  # set afterwards: matplotlib gives a leading "_" and "$" a special meaning
        text.set_parse_math(False)


def _centres(
    panel: Axes, before: np.ndarray, where: np.ndarray, groups: np.ndarray, colours: np.ndarray
) -> None:
    """Mark the centre of every group, with a line from its position before the step."""
    for group in np.unique(groups).tolist():
        start, end = before[groups == group].mean(0), where[groups == group].mean(0)
        panel.plot(*np.stack([start, end]).T, color="black", linewidth=1.2)
        panel.plot(
            *end, marker="o", markersize=10, color=tuple(colours[group]), markeredgecolor="black", zorder=5
        )


def _short(name: str) -> str:
    clean = printable(name)
    return clean if len(clean) <= _LONGEST_NAME else clean[: _LONGEST_NAME - 3] + "..."


_LEAST_PIXELS = 4
TAP = "encoder"
"""Whose features are compared: the encoder's last map."""

Batches = Callable[[Source], Iterable[tuple[Tensor, Tensor, Sequence[str]]]]
"""Source -> its batches: normalised images (B, 3, H, W), labels (B, H, W) on the CPU, names."""


@dataclass(frozen=True)
class Pixels:
    """The features of the same P pixels in two models, sorted by domain and class, in random order within each."""

    before: np.ndarray
    """(P, C) float32 features of the earlier model."""
    after: np.ndarray
    """(P, C) float32 features of the later model."""
    label: np.ndarray
    """(P,) int64, index into `classes`."""
    domain: np.ndarray
    """(P,) int64, index into `domains`."""
    classes: tuple[str, ...]
    domains: tuple[str, ...]

    def groups(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """List domain, class and the positions of their pixels, for every pair that has pixels."""
        for domain, label in np.unique(np.stack([self.domain, self.label], 1), axis=0).tolist():
            yield domain, label, np.flatnonzero((self.domain == domain) & (self.label == label))


@dataclass(frozen=True)
class Drift:
    """How far one class moved in one domain. Distances are in units of the features."""

    domain: str
    class_name: str
    pixels: int
    distance: float
    """Euclidean, from the centre before to the centre after."""
    spread: float
    """Mean Euclidean distance of the pixels before to their centre before."""
    relative: float | None
    """distance / spread; None where the spread is 0."""
    cosine: float | None
    """Cosine similarity of the two centres; None where one is 0."""
    accuracy_before: float
    """Part of the pixels whose nearest centre (of the domain's classes, before) is their own class's, before."""
    accuracy_after: float
    """The same of the features after, still with the centres of before."""
    new: bool = False
    """Whether the earlier model did not know the class."""


def labels_at(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample the label under the centre of every cell of a feature map (nearest neighbour).

    Args:
        label: (B, H, W).
        size: height and width of the map, h and w.

    Returns:
        (B, h, w) of the same type.
    """
    rows, columns = (
        (2 * torch.arange(n) + 1) * full // (2 * n) for n, full in zip(size, label.shape[-2:], strict=True)
    )
    return label[:, rows][:, :, columns]


class _Draw:
    """Keeps the `limit` pixels with the smallest keys of all that are added. The order of adding does not matter."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.keys = np.empty(0)
        self.features: np.ndarray | None = None

    def add(self, keys: np.ndarray, cells: np.ndarray, maps: Tensor) -> None:
        """Add the cells (M,) of one image with their keys (M,); their features are read from maps (2, C, h * w)."""
        best = np.argsort(keys)[: self.limit]
        if len(self.keys) == self.limit:  # full: only keys below the largest kept one can enter
            best = best[keys[best] < self.keys[-1]]
        if not len(best):
            return
        found = maps[:, :, torch.from_numpy(cells[best]).to(maps.device)].permute(2, 0, 1).cpu().numpy()
        features = found if self.features is None else np.concatenate([self.features, found])
        merged = np.concatenate([self.keys, keys[best]])
        order = np.argsort(merged)[: self.limit]
        self.keys, self.features = merged[order], features[order]  # (L,), (L, 2, C) with L <= limit


@torch.no_grad()
def draw_pixels(
    models: tuple[SegmentationModel, SegmentationModel],
    sources: Sequence[Source],
    spaces: Mapping[str, LabelSpace],
    batches: Batches,
    *,
    limit: int,
    seed: int,
    shown: Callable[[int], None] = lambda _: None,
) -> Pixels:
    """Draw labelled pixels and read their encoder features in two models, each domain through its own branch.

    The draw depends only on the seed, the domain and the samples' names. Every cell of a sample's feature map gets a
    random key, and each class and domain keeps its smallest keys. Ignored pixels are left out.

    Args:
        models: before and after, in eval mode.
        sources: labelled images.
        spaces: branch -> label space of the sources' train ids.
        batches: reads a source.
        limit: most pixels per class and domain.
        seed: of the draw.
        shown: called with the number of images seen.

    Raises:
        DataError: fewer than four labelled pixels in all.
        CheckpointError: features that are not finite.
    """
    draws: dict[tuple[str, str], _Draw] = {}
    done = 0
    one_name: dict[
        str, str
    ] = {}  # domains may spell a class differently: the spelling of the first domain is used for all
    for source in sources:
        names = [one_name.setdefault(spelling(name), name) for name in spaces[source.branch].names]
        for image, label, ids in batches(source):
            both = [model(image, (source.branch,))[source.branch].features[TAP].float() for model in models]
            maps = torch.stack(both, 1)
            cells_of = labels_at(label, (maps.shape[-2], maps.shape[-1])).flatten(1).numpy()
            for pair, labels, sample in zip(maps.flatten(3), cells_of, ids, strict=True):
                keys = np.random.default_rng(derive_seed(seed, source.name, sample)).random(len(labels))
                for train_id in np.unique(labels[labels != source.ignored]).tolist():
                    cells = np.flatnonzero(labels == train_id)
                    draw = draws.setdefault((source.name, names[train_id]), _Draw(limit))
                    draw.add(keys[cells], cells, pair)
            done += len(ids)
            shown(done)
    domains = tuple(dict.fromkeys(source.name for source in sources))
    return _pixels(draws, domains, tuple(one_name.values()))


def _pixels(
    draws: Mapping[tuple[str, str], _Draw], domains: tuple[str, ...], classes: tuple[str, ...]
) -> Pixels:
    parts = sorted(
        ((domains.index(d), classes.index(c), draw.features) for (d, c), draw in draws.items()),
        key=lambda part: part[:2],
    )
    features = [part[2] for part in parts if part[2] is not None]
    total = sum(map(len, features))
    if total < _LEAST_PIXELS:
        raise DataError(
            f"the test images show {counted(total, 'labelled pixel')} at the size of the encoder's map; "
            f"features need {_LEAST_PIXELS} at least"
        )
    both = np.concatenate(features)
    if not np.isfinite(both).all():
        raise CheckpointError(
            "the model's features are not finite numbers, so the training of a step failed; look at its "
            "loss in report.html"
        )
    counts = [len(part) for part in features]
    domain, label = (np.repeat(np.array([part[i] for part in parts], np.int64), counts) for i in (0, 1))
    return Pixels(both[:, 0], both[:, 1], label, domain, classes, domains)


def class_drift(pixels: Pixels) -> list[Drift]:
    """Measure how far each class centre moved in each domain, and the effect on nearest-centre classification.

    A centre is the mean of a class's features in one domain; float64.
    """
    rows = []
    groups = list(pixels.groups())
    before, after = pixels.before.astype(np.float64), pixels.after.astype(np.float64)
    for domain in dict.fromkeys(group[0] for group in groups):
        mine = [(label, at) for d, label, at in groups if d == domain]
        centres = np.stack([before[at].mean(0) for _, at in mine])
        for number, (label, at) in enumerate(mine):
            old, new = centres[number], after[at].mean(0)
            distance = float(np.linalg.norm(new - old))
            spread = float(np.linalg.norm(before[at] - old, axis=1).mean())
            size = float(np.linalg.norm(old) * np.linalg.norm(new))
            rows.append(
                Drift(
                    domain=pixels.domains[domain],
                    class_name=pixels.classes[label],
                    pixels=len(at),
                    distance=distance,
                    spread=spread,
                    relative=distance / spread if spread else None,
                    cosine=float(old @ new) / size if size else None,
                    accuracy_before=float((_nearest(before[at], centres) == number).mean()),
                    accuracy_after=float((_nearest(after[at], centres) == number).mean()),
                )
            )
    return rows


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre: (n, C) and (K, C) -> (n,)."""
    return ((centres**2).sum(1) - 2 * features @ centres.T).argmin(1)


def mean_drift(rows: Sequence[Drift]) -> dict[str, float | None]:
    """Average every number over the classes, unweighted; None values are left out."""
    keys = ("distance", "spread", "relative", "cosine", "accuracy_before", "accuracy_after")
    return {key: defined_mean(getattr(row, key) for row in rows) for key in keys}
