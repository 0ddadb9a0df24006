"""Score a finished step again: on its own test images, on other images, or with the branch chosen per image."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everseg import registry
from everseg.config.fields import DataConfig, RunConfig, ScenarioConfig
from everseg.config.loading import from_stored, identity, override_value, refuse_own_code, to_json
from everseg.data.base import Dataset
from everseg.data.batches.index import class_counts
from everseg.data.label_meaning import require_meaning
from everseg.display import OnceADictionary, Piece, Table, percent, table
from everseg.engine.prepare import open_datasets, prepare
from everseg.engine.runtime import make_accelerator
from everseg.errors import ConfigError, DataError
from everseg.inference import count
from everseg.inference.count import score_step, user_builder
from everseg.inference.domains import evaluate_inferred
from everseg.labels import (
    LabelSpace,
    matching_notes,
    policy_name,
    policy_set,
    shared_classes,
    spelling,
)
from everseg.models.build import configured_name
from everseg.progress import Progress
from everseg.runs.commit import verify
from everseg.runs.model_folder import is_bundle, load_model, read_lineage, read_model_file
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder
from everseg.scenarios import extension
from everseg.scenarios.steps import Source, missing_splits, packed

EVALUATION_KEYS = (
    "data.dataset", "data.options", "data.root", "data.crop", "data.size", "data.evaluation", "data.domains.",
    "data.window", "data.overlap",
    "data.normalisation", "data.transform", "data.scale", "data.flip", "data.shift",
    "data.vertical_flip", "data.rotate", "data.brightness", "data.contrast", "data.saturation", "data.hue", "data.blur",
    "scenario.test_split", "scenario.policy", "train.precision", "train.threads", "metrics",
)  # fmt: skip
"""Settings that may differ from the run's. Those of the training transform may too, because scoring ignores them."""


_OPTIONAL = ("dice", "class_dice", "boundary_iou", "class_boundary_iou", "per_image")
"""Beginnings of the names of scores that not every run has."""


def without_absent(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the scores that were not asked for, or that the run's version did not store."""
    return {key: value for key, value in scores.items() if value or not key.startswith(_OPTIONAL)}


@dataclass(frozen=True)
class Scores:
    """Scores of one set of test images, as fractions in [0, 1]. A score is None if no pixel decides it."""

    branch: str
    """Branch that the images went through; "" if it was chosen per image."""
    miou: Mapping[str, float | None]
    """"old", "new", "base" and "all" -> mean IoU over these classes, including the background."""
    miou_without_background: Mapping[str, float | None]
    """The same without the background."""
    harmonic_mean: float | None
    """Harmonic mean of the mIoU of old classes and the mIoU of new classes."""
    overall_accuracy: float | None
    """Share of all pixels that are predicted correctly."""
    mean_accuracy: float | None
    """Mean over the classes of the share of their pixels that is predicted correctly."""
    frequency_weighted_iou: float | None
    class_iou: Mapping[str, float | None]
    """Class -> IoU, in the order of the model's outputs."""
    class_accuracy: Mapping[str, float | None]
    """Class -> share of its pixels that is predicted correctly."""
    new_classes: tuple[str, ...]
    """The classes of `class_iou` that this step taught."""
    dice: Mapping[str, float | None] = field(default_factory=dict, kw_only=True)
    """"old", "new", "base" and "all" -> mean Dice coefficient; {} in runs of everseg 0.1.0, as the next two."""
    dice_without_background: Mapping[str, float | None] = field(default_factory=dict, kw_only=True)
    """The same without the background."""
    class_dice: Mapping[str, float | None] = field(default_factory=dict, kw_only=True)
    """Class -> Dice coefficient."""
    boundary_iou: Mapping[str, float | None] = field(default_factory=dict, kw_only=True)
    """"old", "new", "base", "all" -> mean boundary IoU; {} unless `metrics` asks for boundary-iou, as the next two."""
    boundary_iou_without_background: Mapping[str, float | None] = field(default_factory=dict, kw_only=True)
    """The same without the background."""
    class_boundary_iou: Mapping[str, float | None] = field(default_factory=dict, kw_only=True)
    """Class -> boundary IoU."""
    per_image: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Scores of single images as `metrics.image_statistics` gives them; {} unless `metrics` asks for per-image."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Scores:
        """Make scores from one entry of `metrics.json`."""
        known = {
            one.name: stored[one.name]
            for one in fields(cls)
            if one.name in stored or one.default_factory is MISSING
        }
        for key, value in known.items():
            if key.startswith("class_"):
                known[key] = dict(zip(stored["classes"], value, strict=True))
        return cls(**{**known, "new_classes": tuple(stored["new_classes"])})

    def to_json(self) -> dict[str, Any]:
        """Convert the scores to the form of an entry of `metrics.json`."""
        found = without_absent(asdict(self))
        return {
            **found,
            "classes": list(self.class_iou),
            **{key: list(value.values()) for key, value in found.items() if key.startswith("class_")},
            "new_classes": list(self.new_classes),
        }

    def tables(self, title: str) -> Iterator[Table]:
        """Make tables: the scores of groups and of the whole, those of every class, and those of single images."""
        rows = [
            [f"{what} {group}", percent(value), percent(plain.get(group))]
            for what, means, plain in (
                ("mIoU", self.miou, self.miou_without_background),
                ("Dice", self.dice, self.dice_without_background),
                ("boundary IoU", self.boundary_iou, self.boundary_iou_without_background),
            )
            for group, value in means.items()
        ]
        for key in ("overall_accuracy", "mean_accuracy", "frequency_weighted_iou", "harmonic_mean"):
            rows.append([key.replace("_", " "), percent(getattr(self, key)), ""])
        columns = ["score", "percent", "without background"]
        yield table(columns, rows, title=title, right="percent|without background")
        each = {
            "IoU": self.class_iou,
            "Dice": self.class_dice,
            "boundary IoU": self.class_boundary_iou,
            "accuracy": self.class_accuracy,
        }
        shown = {name: values for name, values in each.items() if values}
        rows = [[name, *(percent(values[name]) for values in shown.values())] for name in self.class_iou]
        yield table(["class", *shown], rows, title="Each class, in percent", right="|".join(shown))
        if self.per_image:
            yield from _per_image_tables(self.per_image, list(self.class_iou))


def _per_image_tables(found: Mapping[str, Any], classes: Sequence[str]) -> Iterator[Table]:
    """Make tables of `metrics.image_statistics`: all images, the classes, and the worst images by name."""
    three = ("mean", "median", "lowest")
    rows = [
        [name, *(percent(found[key][one]) for one in three)]
        for name, key in (("mIoU", "iou"), ("Dice", "dice"))
    ]
    title = f"Single images, each with its mean over the classes in it: {found['images']} images, in percent"
    yield table(["score", *three], rows, title=title, right="|".join(three))
    columns = ["images", "Dice mean", "Dice median", "Dice lowest", "false alarms"]
    rows = [
        [
            name,
            str(found["class_images"][c]),
            *(percent(found["class_dice"][one][c]) for one in three),
            str(found["class_false_alarms"][c]),
        ]
        for c, name in enumerate(classes)
    ]
    title = "Each class over the images that show it (false alarms: images without it in which it is found)"
    yield table(["class", *columns], rows, title=title, right="|".join(columns))
    rows = [[one["image"], percent(one["iou"]), percent(one["dice"])] for one in found["worst"]]
    yield table(["worst images", "mIoU", "Dice"], rows, right="mIoU|Dice")


@dataclass(frozen=True, repr=False, eq=False)
class StepScores(OnceADictionary):
    """The scores of a finished step on some test images. All of them are computed from the confusion counts."""

    run: str
    """Run folder, as the caller gave it."""
    step: int
    images: int
    """Number of test images."""
    branches: Mapping[str, Scores]
    """Name of the results (the domain; without domains the branch) -> scores."""
    confusion: Mapping[str, np.ndarray]
    """Name of the results -> (C, C) int64 pixels: rows are the true classes, columns the predicted ones. If branches
    were chosen per image, an extra last row and column count classes that the domain of the images does not have."""
    inferred: Mapping[str, Mapping[str, int]] | None = None
    """Domain -> branch -> number of images that took it; None unless branches were chosen per image."""
    accuracy: float | None = None
    """Share of these images that took the branch of their own domain; None if that domain was never trained."""
    policy: str = ""
    """Label policy of the test images."""
    notes: tuple[str, ...] = ()
    """Which class names of data and model differ in spelling or have no counterpart, and what that means for scores."""

    def shown(self) -> Iterator[Piece]:
        for name, scores in self.branches.items():
            parts = [self.run, f"step {self.step}", "" if name == "default" else name]
            yield from scores.tables(
                ", ".join(filter(None, [*parts, self.policy and f"label policy {self.policy}"]))
            )
        if self.inferred is not None:
            names = list(dict.fromkeys(branch for taken in self.inferred.values() for branch in taken))
            rows = [[name, *(taken.get(one, 0) for one in names)] for name, taken in self.inferred.items()]
            yield table(["images of", *names], rows, title="Branches chosen per image", right="|".join(names))
            if self.accuracy is not None:
                yield f"{percent(self.accuracy)} % of the images took their own domain's branch"

    def to_json(self) -> dict[str, Any]:
        chosen = {"inferred": self.inferred, "accuracy": self.accuracy} if self.inferred is not None else {}
        return {
            "run": self.run,
            "step": self.step,
            "images": self.images,
            "policy": self.policy,
            **chosen,
            "branches": {name: scores.to_json() for name, scores in self.branches.items()},
            "confusion": {name: counts.tolist() for name, counts in self.confusion.items()},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Job:
    """What is scored: data sets, the test images of each source, and the classes to score."""

    datasets: Mapping[str, Dataset]
    sources: tuple[Source, ...]
    spaces: Mapping[str, LabelSpace]
    """Name of a source -> label space that its table maps raw ids to."""
    notes: tuple[str, ...] = ()
    """Which class names of data and model have no counterpart, and how that affects the scores."""


def evaluate(
    path: str | Path,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    domain: str | None = None,
    infer_domain: bool = False,
    quiet: bool = False,
) -> StepScores:
    """Score a finished step again, on the run's own test images or on others.

    Args:
        path: run folder, or a bundle. A bundle does not name its data, so `overrides` must (`data=...`). It sees whole
            images, and all of the split.
        step: which step; default the last finished one. A bundle holds one model.
        overrides: settings that select other images or another way to present them to the model: `data...`,
            `scenario.test_split`, `scenario.policy`, `train.eval_batch`, `train.precision`, `train.threads`.
        domain: score only this domain of the run. With other images (`data=...`) it is the domain whose branch they
            go through.
        infer_domain: choose the branch of every image by what the domains look like (`models.branch_choice`).

    Returns:
        The scores; on the same data they are exactly those of the run. The notes say which class names of data and
        model differ in spelling or have no counterpart, and how that affects the scores. With `infer_domain`, a branch
        may know classes that the domain of the image does not have. They are counted in an extra last row and column
        of `confusion` and are not among the classes of the scores.

    Raises:
        ConfigError: an override that cannot change the score of a finished model; code of the user that the run folder
            names but `overrides` does not; an unknown domain.
    """
    if is_bundle(Path(path)):
        return _evaluate_bundle(Path(path), step, overrides, domain, infer_domain, quiet)
    folder = RunFolder(Path(path))
    stored, config = folder.config(), stored_config(folder, overrides)
    index = folder.chosen_step(step)
    accelerator = make_accelerator(config.train, training=False)
    # The number of threads decides how sums are rounded; with the run's number the scores are the run's to the bit.
    if config.train.threads is None:
        torch.set_num_threads(folder.threads)
    progress = Progress(quiet=quiet, rank=accelerator.process_index)
    other = _other_images(stored.data, config.data, overrides)
    job = _job(folder, index, stored, config, other, domain, infer_domain, progress)
    images, builder = (config.data, accelerator, progress), user_builder(config.model)
    inferred, accuracy = None, None
    if infer_domain:
        model, spaces, _, _ = folder.load_final(index, builder)
        classes = {branch: space.names for branch, space in spaces.items()}
        found, scores, inferred = evaluate_inferred(
            model,
            classes,
            job.spaces,
            job.sources,
            job.datasets,
            *images,
            batch=config.train.eval_batch,
            metrics=config.metrics,
        )
        accuracy = _share_right(inferred, job.sources)
    else:
        found, scores = score_step(
            folder,
            index,
            job.sources,
            job.datasets,
            *images,
            batch=config.train.eval_batch,
            builder=builder,
            metrics=config.metrics,
        )
    return StepScores(
        str(path),
        index,
        sum(len(source.indices) for source in job.sources),
        {name: Scores.of(stored) for name, stored in scores.items()},
        dict(found.counts),
        inferred,
        accuracy,
        policy_name(config.scenario.policy, config.data.dataset),
        job.notes,
    )


def _evaluate_bundle(
    path: Path,
    step: int | None,
    overrides: Sequence[str],
    domain: str | None,
    infer_domain: bool,
    quiet: bool,
) -> StepScores:
    """Score the model of a bundle on images that the user names. Classes are matched by name."""
    problems = []
    if step is not None:
        problems.append("--step: a bundle holds one model; give the run's folder to choose a step")
    if infer_domain:
        problems.append("--infer-domain: not for a bundle; name the branch with --domain")
    if not _names_data(overrides):
        problems.append(f"data: {path} does not hold the images it was tested on; give some, data=DATA.yaml")
    if problems:
        raise ConfigError(problems)
    verify(path)
    about, lineage = read_model_file(path), read_lineage(path)
    form = about.form.settings()
    if (
        form.get("evaluation", "crop") == "crop"
    ):  # a benchmark's; `predict` too gives whole images to a bundle's model
        form["evaluation"] = "whole"
    windows = about.form.windows()
    if windows is not None:
        form |= {"window": windows.side, "overlap": windows.overlap}
    base = {
        "data": form,
        "model": {
            "name": configured_name(about.architecture["name"]),
            "options": about.architecture["options"],
        },
        "train": {"eval_batch": 1},  # images may differ in size
    }
    before, config = from_stored(base), from_stored(base, overrides)
    _refuse_training_settings(before, config, where="bundle")
    refuse_own_code(config, overrides, kinds=("model", "dataset"))
    accelerator = make_accelerator(config.train, training=False)
    progress = Progress(quiet=quiet, rank=accelerator.process_index)
    branches = {**{branch: branch for branch in about.spaces}, **about.domains}
    if domain is not None and domain not in branches:
        raise ConfigError(f"--domain {domain}: the model of {path} knows {', '.join(branches)}")
    if domain is None and len(about.spaces) > 1:
        raise ConfigError(
            f"which branch shall the images take? --domain {' or '.join(about.domains or about.spaces)}"
        )
    branch = next(iter(about.spaces)) if domain is None else branches[domain]
    space = about.spaces[branch]
    ((_, dataset),) = open_datasets(config.data).items()
    source, notes = source_by_name(dataset, config.scenario, branch, space, domain=domain or "")
    model, _ = load_model(path, user_builder(config.model), about)
    found = count.evaluate(
        model, [source], {source.dataset: dataset}, config.data, accelerator, progress,
        batch=config.train.eval_batch, title=f"testing {path.name} on {source.split}", metrics=config.metrics, keep=0,
    )  # fmt: skip
    scores = count.scores_of(found, about.spaces)
    return StepScores(
        str(path),
        int(lineage["steps"]) - 1,
        len(source.indices),
        {name: Scores.of(stored) for name, stored in scores.items()},
        dict(found.counts),
        policy=policy_name(config.scenario.policy, config.data.dataset),
        notes=tuple(notes),
    )


def _names_data(overrides: Sequence[str]) -> bool:
    """Whether overrides say which data set is meant."""
    given = {key.strip(): override_value(value)[0] for key, _, value in (t.partition("=") for t in overrides)}
    whole = given.get("data")
    return (
        "data.dataset" in given or isinstance(whole, str) or (isinstance(whole, dict) and "dataset" in whole)
    )


def _share_right(chosen: Mapping[str, Mapping[str, int]], sources: Iterable[Source]) -> float | None:
    """Compute the share of images that took the branch of their own domain; None if no image has such a branch."""
    known = {source.name: source.branch for source in sources if source.branch}
    total = sum(sum(chosen[name].values()) for name in known)
    return sum(chosen[name].get(branch, 0) for name, branch in known.items()) / total if total else None


def stored_config(
    folder: RunFolder,
    overrides: Sequence[str] = (),
    *,
    kinds: Collection[str] = ("model", "dataset", "scenario"),
    stored: RunConfig | None = None,
) -> RunConfig:
    """Read the configuration of a finished run and apply overrides that select other images or another presentation.

    Args:
        kinds: the kinds of code that the caller is going to import for this configuration. If the run folder names
            code of the user of these kinds, `overrides` must name it too.
        stored: the run's configuration, if the caller has read it before.

    Raises:
        ConfigError: an override that could only have changed the training; code of the user that `overrides` does not
            name.
    """
    stored = stored or folder.config()
    config = from_stored(to_json(stored), overrides)
    _refuse_training_settings(stored, config)
    refuse_own_code(config, overrides, kinds=kinds)
    return config


def _job(
    folder: RunFolder,
    index: int,
    stored: RunConfig,
    config: RunConfig,
    other: bool,
    domain: str | None,
    infer: bool,
    progress: Progress,
) -> _Job:
    """Decide what to score: the scenario's own test images, or other images whose classes are matched by name."""
    spaces = folder.spaces(index)
    branch_of = folder.branch_of(index)  # name of the results -> branch
    several = bool(stored.data.domains)
    if domain is not None and infer and other:
        raise ConfigError(
            "--domain names the branch of all images, --infer-domain chooses it per image; give one"
        )
    choices = list(dict.fromkeys([*branch_of, *spaces])) if other else list(branch_of)
    if domain is not None and domain not in choices:
        raise ConfigError(f"--domain {domain}: step {index} of {folder.path} knows {', '.join(choices)}")
    if several and not other:
        chosen = [domain] if domain is not None else list(branch_of)
        kept = {name: config.data.domains[name] for name in chosen}
        datasets = open_datasets(config.data.model_copy(update={"domains": kept}))
        planned = folder.scenario()["steps"] if config.scenario == stored.scenario else []
        recorded = _recorded_tests(planned, index)
        told = [
            _own_test(datasets[name], config.scenario, name, branch_of[name], spaces, recorded.get(name))
            for name in chosen
        ]
        sources, notes = [source for source, _ in told], [note for _, notes in told for note in notes]
        return _Job(
            datasets, tuple(sources), {name: spaces[branch_of[name]] for name in chosen}, tuple(notes)
        )
    own_scenario = config.scenario.kind not in registry.BUILTIN["scenario"]
    if own_scenario and not other and stored.scenario == config.scenario:
        prepared = prepare(config.data, config.scenario, progress, seed=config.seed)
        step = next((step for step in prepared.steps if step.index == index), None)
        # The data may have other classes than when the run was trained; then classes are matched by name below.
        if step is not None and step.spaces == spaces:
            test = step.test
            return _Job(prepared.datasets, test, {source.name: spaces[source.branch] for source in test})
    datasets = open_datasets(config.data.model_copy(update={"domains": {}}))
    ((name, dataset),) = datasets.items()
    if several and infer:
        space, known = _common_space(dataset, spaces.values())
        # Score against the classes that data and branches share, but take the notes about all that the branches know.
        (source, _), (_, notes) = (
            source_by_name(dataset, config.scenario, "", one, domain=name) for one in (space, known)
        )
        found = [(source, notes)]
    elif several:
        if domain is None:
            raise ConfigError(
                f"which branch shall the images of '{name}' take? --domain {' or '.join(branch_of)}, or --infer-domain"
            )
        branch = branch_of.get(domain, domain)
        found = [source_by_name(dataset, config.scenario, branch, spaces[branch], domain=name)]
    else:
        found = [
            source_by_name(dataset, config.scenario, branch, space, foreign=other)
            for branch, space in spaces.items()
        ]
    sources = [source for source, _ in found]
    seen = {s.name: spaces[s.branch] if s.branch else space for s in sources}
    notes = [note for _, told in found for note in told]
    return _Job(datasets, tuple(sources), seen, tuple(dict.fromkeys(notes)))


def sources_of_test(
    results: Results, data: DataConfig, scenario: ScenarioConfig
) -> tuple[Mapping[str, Dataset], tuple[Source, ...], list[str]]:
    """Find the test images of the last finished step as `evaluate` does, reading only the test split.

    Args:
        results: what the run has stored.
        data: the run's data. Their folders may differ from those at training time.
        scenario: of the run.

    Returns:
        The data sets, the sources, and notes on class names that differ in spelling or have no counterpart.

    Raises:
        ConfigError, DataError: the test images are missing, or share no class name with the model.
    """
    step = results.steps[-1]
    if data.domains:
        names = [name for name in step.branch_of if name in data.domains]
        kept = {name: data.domains[name] for name in names}
        datasets = open_datasets(data.model_copy(update={"domains": kept}))
        recorded = _recorded_tests(results.planned, step.index)
        found = [
            _own_test(datasets[name], scenario, name, step.branch_of[name], step.spaces, recorded.get(name))
            for name in names
        ]
    else:
        datasets = open_datasets(data)
        ((_, dataset),) = datasets.items()
        found = [
            source_by_name(dataset, scenario, branch, space, foreign=False)
            for branch, space in step.spaces.items()
        ]
    return datasets, tuple(source for source, _ in found), [note for _, notes in found for note in notes]


def _own_test(
    dataset: Dataset,
    scenario: ScenarioConfig,
    domain: str,
    branch: str,
    spaces: Mapping[str, LabelSpace],
    recorded: Mapping[str, Any] | None,
) -> tuple[Source, list[str]]:
    """Make the test source of a domain from its record. If the record does not fit any more, match classes by name."""
    source = source_as_recorded(dataset, recorded, spaces[branch])
    if source is not None:
        return source, []
    return source_by_name(dataset, scenario, branch, spaces[branch], domain=domain, foreign=False)


def _other_images(stored: DataConfig, asked: DataConfig, overrides: Sequence[str]) -> bool:
    """Tell whether the user asked for another data set than the run's. In runs over domains, any data set counts."""
    if (stored.dataset, stored.options) != (asked.dataset, asked.options):
        return True
    return bool(stored.domains) and _names_data(overrides)


def _common_space(dataset: Dataset, spaces: Iterable[LabelSpace]) -> tuple[LabelSpace, LabelSpace]:
    """Make two label spaces: the data set's classes that some branch knows, and all classes of all branches.

    The first one is for images whose branch is chosen one by one. Its class names are spelt as in the branches.
    """
    names, background = dict[str, str](), None
    for space in spaces:
        for name in space.names:
            names.setdefault(spelling(name), name)
        if space.background is not None:
            background = spelling(space.names[space.background])
    together = LabelSpace(
        (tuple(range(len(names))),),
        tuple(names.values()),
        None if background is None else list(names).index(background),
    )
    shared = shared_classes(dataset.labels, together, what=_sides(dataset))
    labels = dataset.labels
    pairs = {raw: together.names[train_id] for raw, train_id in shared.train_ids.items()}
    if together.background is not None and labels.background is not None:
        pairs[labels.background] = together.names[together.background]
    if not pairs:
        raise _nothing_shared(dataset, names.values())
    ids = tuple(raw for raw in labels.names if raw in pairs)
    common = LabelSpace(
        (ids,),
        tuple(pairs[raw] for raw in ids),
        ids.index(labels.background) if labels.background in ids else None,
    )
    return common, together


def _sides(dataset: Dataset) -> tuple[str, str]:
    """Name the two sides whose class names are matched, for notes."""
    return f"data set '{dataset.name}'", "the model"


def _nothing_shared(dataset: Dataset, known: Iterable[str]) -> DataError:
    return DataError(
        f"data set '{dataset.name}' shares no class name with the model: it has "
        f"{', '.join(dataset.labels.names.values())}; the model knows {', '.join(known)}"
    )


def _refuse_training_settings(stored: RunConfig, config: RunConfig, where: str = "run") -> None:
    """Refuse changed settings that act on training only. Ignoring them would suggest that they had an effect."""
    before, now = identity(stored), identity(config)
    changed = [key for key in now if now[key] != before.get(key) and not key.startswith(EVALUATION_KEYS)]
    if changed:
        raise ConfigError(
            [
                f"{key}: cannot be changed for a finished {where}; start another run for that"
                for key in changed
            ]
        )


def _recorded_tests(steps: Sequence[Mapping[str, Any]], index: int) -> dict[str, Mapping[str, Any]]:
    """Collect what scenario.json records about a step's test images, by domain."""
    tests = [entry for step in steps if step["index"] == index for entry in step["test"]]
    return {entry["domain"]: entry for entry in tests if entry.get("domain")}


def source_as_recorded(dataset: Dataset, entry: Mapping[str, Any] | None, space: LabelSpace) -> Source | None:
    """Make a test source of a run again from its record, reading only the test split.

    Returns:
        The source, or None if the record does not fit the data any more: other images, or other raw ids of classes.
    """
    if entry is None or entry["split"] not in dataset.splits:
        return None
    table, names = entry["lut"], dataset.labels.names
    # Raw ids that the record maps to a class; `names` are the data's, so the same id may mean another class by now.
    labelled = [raw for raw, value in enumerate(table) if value not in (space.ignored, space.background)]
    if any(raw not in names or spelling(names[raw]) != spelling(space.names[table[raw]]) for raw in labelled):
        return None
    counts = class_counts(dataset.splits[entry["split"]], dataset.labels)
    require_meaning(dataset, {entry["split"]: counts})
    taught = counts[:, labelled].sum(1) > 0
    # The record stores the number of images and a digest, not the rows. Either all images were used, or those that
    # show a taught class; the digest tells whether this guess is right.
    rows = np.arange(len(counts)) if len(counts) == entry["images"] else np.flatnonzero(taught)
    source = Source(
        entry["branch"],
        entry["dataset"],
        entry["split"],
        tuple(map(int, rows)),
        packed(table, space.num_classes),
        entry["domain"],
    )
    return source if source.digest == entry["sha256"] else None


def source_by_name(
    dataset: Dataset,
    scenario: ScenarioConfig,
    branch: str,
    space: LabelSpace,
    *,
    domain: str = "",
    foreign: bool = True,
) -> tuple[Source, list[str]]:
    """Make a test source, reading only the test split. Classes are matched by name; others follow the label policy.

    On the run's own data this counts the same pixels as the source that the scenario builder makes. In benchmarks
    those are the images that show any known class, with all known classes labelled. An extension and foreign data are
    no benchmark: every image counts, because a model is wrong too where it finds classes that an image does not show.

    Args:
        foreign: whether the data set is not the one that the run was trained on. The notes mention classes that the
            model does not know only for a foreign data set; in the run's own they are expected.

    Returns:
        The source, and notes on class names that differ in spelling or have no counterpart.

    Raises:
        ConfigError: the split does not exist, or a name may mean two classes.
        DataError: data set and model share no class.
    """
    split_name = scenario.test_split
    if missing := missing_splits(f"data set '{dataset.name}'", [split_name], dataset.splits):
        raise ConfigError(missing)
    counts = class_counts(dataset.splits[split_name], dataset.labels)
    require_meaning(dataset, {split_name: counts})
    shared = shared_classes(dataset.labels, space, what=_sides(dataset))
    known = shared.train_ids
    if not known:
        raise _nothing_shared(dataset, space.names)
    extends = scenario.kind == "extension"
    policies = policy_set(scenario.policy)
    if extends and not foreign:
        policies = extension.tested(policies)
    table = space.lut_for(dataset.labels, known, policies.test)
    shows = counts[:, list(known)].sum(1) > 0  # counts: (N, 256) pixels per raw id of every image
    indices = np.arange(len(counts)) if extends or foreign else np.flatnonzero(shows)
    key = domain or dataset.name
    source = Source(
        branch, key, split_name, tuple(map(int, indices)), packed(table, space.num_classes), domain
    )
    told = shared if foreign else replace(shared, only_data={})
    notes = matching_notes(told, space, source.lut, counts[indices].sum(0), what=_sides(dataset))
    if foreign and not shows.all():
        notes.append(
            f"{len(counts) - int(shows.sum())} of the {len(counts)} images in split '{split_name}' of data set "
            f"'{dataset.name}' show no class that the model knows; what it finds in them counts as wrong"
        )
    return source, notes
