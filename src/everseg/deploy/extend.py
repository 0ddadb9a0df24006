"""Training of further classes, or on more images of known ones, into a deployed model, from its bundle alone."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from everseg import registry
from everseg.config.fields import DataConfig, ModelConfig, RunConfig, ScenarioConfig, TrainConfig
from everseg.config.loading import difference, from_stored, refuse_own_code
from everseg.data.base import Dataset
from everseg.data.datasets import load_dataset
from everseg.deploy.bundle import Bundle, new_folder, open_bundle, write_bundle
from everseg.deploy.export import of_run, recipe_of, sketch_of_run
from everseg.deploy.old_classes import (
    LOOKED,
    Gate,
    Kept,
    Pair,
    estimated,
    fit,
    measured,
    seen_in_background,
    together,
    unlabelled,
)
from everseg.deploy.onnx import require_onnx
from everseg.deploy.reclass import ClassChanges, ClassEdits, change_classes
from everseg.deploy.trial_images import images_of, images_of_run
from everseg.display import Piece, Result, capital, counted, percent
from everseg.engine.prepare import Prepared, prepare
from everseg.engine.run import execute
from everseg.engine.runtime import make_accelerator
from everseg.engine.step import iterations_of
from everseg.errors import CheckpointError, ConfigError, DataError, GateError, some
from everseg.files import real_path
from everseg.inference.count import user_builder
from everseg.models.build import configured_name
from everseg.progress import Progress, seconds_of, time_text
from everseg.reports.figures import curves_of
from everseg.reports.html import NAME as REPORT
from everseg.reports.html import report_at_the_end
from everseg.runs.commit import verify
from everseg.runs.memory import Memory, read_memory
from everseg.runs.model_edits import check_branch_name, own_norms
from everseg.runs.model_folder import is_bundle
from everseg.runs.results import OnNew, Results, StepResults, Taught
from everseg.runs.run_folder import RunFolder
from everseg.runs.signature import require_signature as signed
from everseg.runs.sketch import Sketch, read_sketch
from everseg.scenarios.steps import Source

How = Literal["quick", "balanced", "thorough"]
"""How thoroughly a model is extended, in a word."""
OldVal = str | Path | Sequence[str] | None
"""What `--old-val` names: data, or "NAME=DATA" for each of several branches."""
_TRIED = 6
"""Iterations that a preview measures."""


@dataclass(frozen=True, repr=False)
class Preview(Result):
    """What an extension would do, and how long it takes here. Nothing of it is kept."""

    lines: tuple[str, ...]
    """What the new data hold, and what the deployed model finds in them."""
    taught: tuple[str, ...]
    """The new classes."""
    refined: tuple[str, ...]
    """The known classes that the new data label."""
    kept: tuple[str, ...]
    """The known classes that they do not label: only the method keeps these."""
    method: str
    iterations: int
    seconds_per_iteration: float
    """Median of a few iterations, measured."""
    test_images: int
    seconds: float
    """Estimate of the whole: the iterations, and the tests of both models."""

    def shown(self) -> Iterator[Piece]:
        yield from self.lines
        yield f"taught: {', '.join(self.taught) or 'no new class'}; refined: {', '.join(self.refined) or 'none'}"
        yield f"kept:   {', '.join(self.kept) or 'nothing else is known'}; method {self.method}"
        yield (
            f"time:   about {time_text(self.seconds)} here: {counted(self.iterations, 'iteration')} of "
            f"{self.seconds_per_iteration:.2g} s (the median of {_TRIED}, measured now), and the tests on "
            f"{counted(self.test_images, 'image')}"
        )
        yield "dry run: nothing was kept"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, repr=False)
class Extension(Result):
    """Result of `extend`: a bundle that knows further classes."""

    bundle: Bundle
    run: Path
    """Folder of the run that trained the model."""
    kept: Kept
    """Quality of the old classes that is left."""
    taught: tuple[Taught, ...]
    """Each new class on every test image of the new data: its IoU, and how much else is called so."""
    gate: Gate
    """What was asked of the old classes' quality."""
    on_new: tuple[OnNew, ...] = ()
    """Each old class on the new data's test images, before and after."""
    notes: tuple[str, ...] = ()
    """Remarks on class names in the new data and in `old_val` that differ in spelling or have no match."""

    @property
    def new(self) -> dict[str, float | None]:
        """IoU of each new class on every test image of the new data."""
        return {one.name: one.iou for one in self.taught}

    def shown(self) -> Iterator[Piece]:
        if self.taught:
            yield f"new:  {_new_text(self.taught)}"
        if told := [one for one in self.on_new if one.pixels]:
            yield f"seen: {_seen_text(told)} (IoU of old classes on the new images, percent)"
        yield f"old:  {self.kept.text}"
        if asked := self.gate.text:
            yield (
                f"gate: PASS, {percent(self.kept.share)} % of the old classes' quality is left, and {asked} was asked "
                "for. It does not judge the other pixels that are called a new class (line 'new')"
            )
        yield from self.bundle.parity_text()
        page = self.run / REPORT
        more = f"; {page} shows it" if page.exists() else ""
        yield f"wrote {self.bundle.path} (the old bundle is not changed; the run is {self.run}{more})"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.bundle.path),
            "sha256": self.bundle.digest,
            "run": str(self.run),
            "kept": asdict(self.kept),
            "new": self.new,
            "taught": [asdict(one) for one in self.taught],
            "on_new": [asdict(one) for one in self.on_new],
            "gate": self.gate.mean,
            "gate_each": self.gate.each,
            "notes": list(self.notes),
        }


def extend(
    bundle: str | Path,
    *,
    data: str | Path | None = None,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    merge: Mapping[str, Sequence[str]] | None = None,
    rename: Mapping[str, str] | None = None,
    method: str | None = None,
    how: How | None = None,
    budget: str | None = None,
    out: str | Path | None = None,
    keep_at_least: float | None = None,
    keep_each_at_least: float | None = None,
    old_val: OldVal = None,
    domain: str | None = None,
    like: str | None = None,
    shared: bool = False,
    images: str | Path | None = None,
    onnx: bool | None = None,
    overrides: Sequence[str] = (),
    require_signature: str | Path | None = None,
    model: str | None = None,
    quiet: bool = False,
) -> Extension | ClassChanges:
    """Teach a bundle's model further classes, more images, or another place or device, without its old data.

    The bundle itself is not changed.

    The step is a run of the engine in `runs/<name of the new bundle>`. A killed run continues when the function is
    called again, and on the CPU the result is byte-identical. The run uses the training settings of the bundle (crop,
    batch, the later steps' epochs and learning rate) unless `overrides` change them.

    Args:
        bundle: folder of the deployed model.
        data: a data.yaml (or a data set's name, with `data.root=DIR` in `overrides`) that labels the new classes.
        add: names of the new classes, in any spelling (`everseg.labels.spelling`). The bundle spells them as the data
            do. () refines the classes that the bundle knows and the data label.
        drop: classes that the model loses.
        merge: new class -> the classes that become one under its name.
        rename: class -> its new name. These three need no training. Without `data` nothing else happens; with data the
            model is extended afterwards, from a bundle of the changed classes, `<name of the new bundle>-classes`.
        method: the method that preserves the old classes. Default "mib"; without new classes, and for a model without
            background, "complete".
        how: instead of a method: "quick" (the classifiers alone are trained, with `add` only the new one), "balanced"
            (the default method), or "thorough" (the same with the images of earlier steps, which the bundle must hold).
        budget: instead of both: the time that the extension may take here, such as "10min". A few iterations of each
            word are measured, and the most thorough one that fits is taken. A run that has begun keeps its own.
        out: a new folder; default the bundle's name with -v2, -v3, ...
        keep_at_least: share of the old classes' quality that must be left, 0 to 1. Below it, no new bundle is written.
        keep_each_at_least: the same share for every old class that is judged.
        old_val: data with labels of old classes, for measuring that share. Without such data the share is estimated. Of
            a bundle with several branches: "NAME=DATA" for each branch or domain that is to be measured.
        domain: the place or device that the new data come from. A name that the bundle knows takes its branch. A new
            name gets a branch of its own, which begins as a copy of the nearest one.
        like: the branch that is nearest; default the one whose classes fit the labels of some new images best.
        shared: a new name takes that nearest branch itself.
        images: as for `export`.
        onnx: write the ONNX file; by default if the old bundle has one.
        overrides: "key=value" as for `run`.
        require_signature: file of the public key that must have signed the bundle (`everseg sign`).
        model: FILE.py:NAME of your own architecture, if the bundle has one.

    Returns:
        The extension; or without data the changes of the classes.

    Raises:
        ConfigError: the data lack a new class, the bundle knows it already, or the folder exists.
        GateError: less quality is left than required. The run is kept, but no bundle is written.
        EversegError: as `run`.
    """
    if require_signature is not None:
        digest = signed(Path(bundle), require_signature).digest
    source = open_bundle(bundle)
    if require_signature is not None and source.digest != digest:
        raise CheckpointError(f"{bundle} changed after its signature was checked; try again")
    target = Path(out) if out is not None else _next_name(source.path)
    edits = ClassEdits.of(drop, merge, rename)
    if data is None:
        _needs_no_data(
            edits, overrides, add=add, method=method, how=how, budget=budget, old_val=old_val, domain=domain, like=like,
            shared=shared, keep_at_least=keep_at_least is not None, keep_each_at_least=keep_each_at_least is not None,
        )  # fmt: skip
        return change_classes(source, target, edits, images=images, onnx=onnx, builder=_builder(model))
    if edits:
        between = target.with_name(f"{target.name}-classes")
        changed = change_classes(source, between, edits, onnx=False, builder=_builder(model))
        source = open_bundle(between)
        for line in changed.lines:
            Progress(quiet=quiet).message(line)
    gate = Gate(keep_at_least, keep_each_at_least)
    with_onnx = bool(source.about.onnx) if onnx is None else onnx
    if with_onnx:
        require_onnx()
    asked = _Asked(source, data, tuple(add), method, how, tuple(overrides), model)
    asked = asked.at(domain, like, shared, Progress(quiet=quiet))
    asked = _within(budget, asked, target.name, Progress(quiet=quiet))
    return _extended(asked, target, gate, _old_data(old_val, source), with_onnx, images, quiet)


def _extended(
    asked: _Asked,
    target: Path,
    gate: Gate,
    measured_on: Mapping[str, str],
    with_onnx: bool,
    images: str | Path | None,
    quiet: bool,
) -> Extension:
    """Do what `extend` is asked for, once it is decided.

    Args:
        target: the new bundle.
        measured_on: branch -> data that its old classes are measured on.
    """
    source, config = asked.source, asked.configuration(target.name)
    folder = RunFolder(Path(config.out) / config.name)
    # A killed call may have written the bundle already; only other things in its place are refused here.
    if not is_bundle(target):
        new_folder(target)
    processes = PartialState(cpu=not torch.cuda.is_available())
    progress = Progress(quiet=quiet, rank=processes.process_index)
    begun = bool(folder.finished_steps)
    builder = user_builder(config.model)
    # a finished run that is measured on other data does not need the new data
    measures_only = begun and measured_on.keys() == source.spaces.keys()
    prepared = None if measures_only else prepare(config.data, config.scenario, progress, seed=config.seed)
    if prepared is not None and not begun:
        if is_bundle(target):
            new_folder(target)
        for line in _lines(
            source,
            prepared,
            config.data,
            config.scenario,
            config.train,
            config.model,
            builder,
            bool(measured_on),
        ):
            progress.message(line)
    execute(config, quiet=quiet)
    index = source.steps
    accelerator = make_accelerator(config.train, training=False)
    pairs = _pairs(folder, index, builder, accelerator.device, source.spaces)
    kept = _kept(
        pairs,
        prepared,
        measured_on,
        config.data,
        config.scenario,
        accelerator,
        progress,
        config.train.eval_batch,
        read_sketch(source.path),
    )
    results = StepResults(folder, index)
    new = tuple(
        one for name, entry in results.scores.items() for one in results.taught(name, entry["new_classes"])
    )
    on_new = tuple(one for name in results.scores for one in results.old_on_new(name))
    told = {key: value for key, value in asdict(kept).items() if key != "notes" or value}
    if processes.is_main_process:
        # The gate belongs to the bundle's quality, not to the run's identity, so another call may ask for another one.
        document = json.loads(
            json.dumps({**told, "gate": gate.mean, "gate_each": gate.each, "verdict": gate.verdict(kept)})
        )
        changed = folder.kept(index) != document
        if changed:
            folder.save_kept(index, document)
        if config.report:
            report_at_the_end(Results(folder), config, quiet=quiet, again=changed)
    if why := gate.fails(kept):
        raise GateError(_failed(source, folder, target, kept, new, why))
    if processes.is_main_process:
        memory = read_memory(source.path) is not None and read_memory(folder.final(index)) is not None
        _write(target, folder, index, builder, told, with_onnx, images, asked.overrides, memory, source)
    processes.wait_for_everyone()
    notes = (*(prepared.notes if prepared is not None else ()), *kept.notes)
    return Extension(open_bundle(target), folder.path, kept, new, gate, on_new, notes)


def preview(
    bundle: str | Path,
    *,
    data: str | Path | None = None,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    merge: Mapping[str, Sequence[str]] | None = None,
    rename: Mapping[str, str] | None = None,
    method: str | None = None,
    how: How | None = None,
    budget: str | None = None,
    overrides: Sequence[str] = (),
    model: str | None = None,
    old_val: OldVal = None,
    domain: str | None = None,
    like: str | None = None,
    shared: bool = False,
    keep_at_least: float | None = None,
    keep_each_at_least: float | None = None,
    require_signature: str | Path | None = None,
    quiet: bool = False,
) -> Preview | ClassChanges:
    """Say what `extend` with the same arguments would teach and keep, and measure how long it would take here.

    A few iterations run in a temporary folder, in this process alone.

    Raises:
        EversegError: as `extend`, as far as it can be known before the training.
    """
    progress = Progress(quiet=quiet)
    if require_signature is not None:
        signed(Path(bundle), require_signature)
    Gate(
        keep_at_least, keep_each_at_least
    )  # it is judged after the training; a share that is none is told now
    source, edits = open_bundle(bundle), ClassEdits.of(drop, merge, rename)
    if data is None:
        _needs_no_data(
            edits, overrides, add=add, method=method, how=how, budget=budget, old_val=old_val, domain=domain, like=like,
            shared=shared, keep_at_least=keep_at_least is not None, keep_each_at_least=keep_each_at_least is not None,
        )  # fmt: skip
        target = _next_name(source.path)
        return change_classes(source, target, edits, builder=_builder(model), dry_run=True)
    with tempfile.TemporaryDirectory(prefix="everseg-preview-") as place:
        if edits:
            between = Path(place) / real_path(source.path).name
            changed = change_classes(source, between, edits, onnx=False, builder=_builder(model))
            source = open_bundle(between)
            for line in changed.lines:
                progress.message(line)
        asked = _Asked(source, data, tuple(add), method, how, tuple(overrides), model)
        asked = asked.at(domain, like, shared, progress)
        return _previewed(_within(budget, asked, None, progress), progress, measuring=old_val is not None)


def _needs_no_data(edits: ClassEdits, overrides: Sequence[str], **given: Any) -> None:
    """Stop unless something is asked for that needs no data, and nothing else is.

    Args:
        given: options that mean nothing without new images, and what is given for each; false values are none.

    Raises:
        ConfigError: something is.
    """
    if not edits:
        raise ConfigError(
            "--data: name the new images (a data.yaml); only --drop, --merge and --rename need none"
        )
    needing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if needing := [*needing, *overrides]:
        raise ConfigError(
            f"{', '.join(needing)}: nothing is trained or judged without new images; name them with --data"
        )


def _builder(model: str | None) -> Any:
    return None if model is None else registry.resolve("model", model)


@dataclass(frozen=True)
class Place:
    """Where the images of an extension come from, and which branch they take; see `ScenarioConfig`."""

    domain: str | None = None
    branch: str | None = None
    like: str | None = None


@dataclass(frozen=True)
class _Asked:
    """What the caller wants of an extension, as `extend` takes it."""

    source: Bundle
    data: str | Path
    add: tuple[str, ...]
    method: str | None
    how: How | None
    overrides: tuple[str, ...]
    model: str | None
    place: Place = field(default_factory=Place)

    def configuration(self, name: str) -> RunConfig:
        return configuration(
            self.source,
            self.data,
            self.add,
            self.method,
            name,
            self.overrides,
            self.model,
            self.how,
            self.place,
        )

    def at(self, domain: str | None, like: str | None, shared: bool, progress: Progress) -> _Asked:
        """Decide which branch the new images take.

        Raises:
            ConfigError: names that do not fit each other or the bundle.
        """
        known = {**{branch: branch for branch in self.source.spaces}, **self.source.about.domains}
        if domain is None or domain in known:
            if like is not None or shared:
                which = "names a new place" if domain is None else f"'{domain}' has a branch already"
                raise ConfigError(
                    f"--like, --shared: they choose the branch of a new place; --domain {which}"
                )
            return self if domain is None else replace(self, place=Place(domain, known[domain]))
        if like is not None and like not in known:
            raise ConfigError(f"--like {like}: the bundle knows {', '.join(known)}")
        if not shared:
            check_branch_name(domain)
        origin = known[like] if like is not None else self.nearest(progress)
        return replace(self, place=Place(domain, origin) if shared else Place(domain, domain, origin))

    def nearest(self, progress: Progress) -> str:
        """Find the branch that labels some of the new images best, by mean IoU over the classes that it shares.

        It is the first one if no branch shares a class.
        """
        first, *others = self.source.spaces
        if not others:
            return first
        found = dict[str, float]()
        # Nothing is trained here, and another method may not know the options of the one that is asked for.
        plain = tuple(text for text in self.overrides if not text.startswith(("method=", "method.")))
        for branch in (first, *others):
            config = replace(
                self, add=(), method="complete", how=None, overrides=plain, place=Place(None, branch)
            ).configuration("nearest")
            try:
                prepared = prepare(config.data, config.scenario, Progress(quiet=True), seed=config.seed)
            except DataError:  # no class in common
                found[branch] = -1.0
                continue
            builder = user_builder(config.model)
            accelerator = make_accelerator(config.train.model_copy(update={"threads": None}), training=False)
            found[branch] = fit(
                self.source.model(builder), prepared.steps[0].train[0], self.source.spaces[branch],
                prepared.datasets, config.data, accelerator, batch=config.train.eval_batch,
            )  # fmt: skip
        best = max(found, key=lambda branch: found[branch])
        told = ", ".join(f"{branch} {percent(value)}" for branch, value in found.items() if value >= 0)
        progress.message(
            f"nearest: {best} ({told or 'none shares a class with the data'}; mIoU on some new images)"
        )
        return best


def _within(budget: str | None, asked: _Asked, name: str | None, progress: Progress) -> _Asked:
    """Choose the most thorough word of `How` whose extension fits into a time here.

    Args:
        budget: the time; None = as asked.
        name: name of the run, if one is to be trained: if it has begun, its own word is chosen again, so that the same
            command goes on with it whatever the machine has to do meanwhile. None = no run.

    Raises:
        ConfigError: the budget is no time, a method or a word is given too, there are several processes, or nothing
            fits.
    """
    if budget is None:
        return asked
    if (seconds := seconds_of(budget)) is None:
        raise ConfigError(f"--budget {budget}: expected a time such as 90s, 10min or 1.5h")
    if asked.method is not None or asked.how is not None:
        raise ConfigError("--budget chooses the method; leave --method and --how out")
    if PartialState(cpu=not torch.cuda.is_available()).num_processes > 1:
        raise ConfigError("--budget measures in one process; with several, choose --how yourself")
    # With images of earlier steps in the bundle, "balanced" trains on them too: it is "thorough" then.
    slower: How = "balanced" if read_memory(asked.source.path) is None else "thorough"
    words = [replace(asked, how=how) for how in (slower, "quick")]
    if name is not None:
        for one in words:
            config = one.configuration(name)
            folder = RunFolder(Path(config.out) / config.name)
            if folder.is_begun and not difference(folder.config(), config):
                return one
    told = []
    for one in words:
        seen = _previewed(one, Progress(quiet=True), measuring=True)
        told.append(f"{one.how} about {time_text(seen.seconds)}")
        if seen.seconds <= seconds:
            progress.message(f"budget: {budget} here: {', '.join(told)}; so {one.how}")
            return one
    spent = seen.iterations * seen.seconds_per_iteration
    epochs = one.configuration("preview").train.epochs
    fitting = int(epochs * (seconds - (seen.seconds - spent)) / spent) if spent else 0
    way = (
        f"train.epochs={fitting} instead of {epochs} would fit"
        if fitting >= 1
        else "the tests alone take longer"
    )
    raise ConfigError(
        f"--budget {budget}: nothing fits here ({', '.join(told)}); {way}. Give more time, fewer images or epochs"
    )


def _previewed(asked: _Asked, progress: Progress, measuring: bool) -> Preview:
    """Make the preview of an extension.

    Args:
        measuring: labels of old classes are at hand.
    """
    source, config = asked.source, asked.configuration("preview")
    builder = user_builder(config.model)
    prepared = prepare(config.data, config.scenario, progress, seed=config.seed)
    (step,) = prepared.steps
    began = perf_counter()
    told = _lines(
        source, prepared, config.data, config.scenario, config.train, config.model, builder, measuring
    )
    lines = tuple(told)
    # The check of the background has sent some training images through the deployed model: what a test costs, too.
    looked = min(LOOKED, len(step.train[0].indices))
    per_image = (perf_counter() - began) / looked
    with tempfile.TemporaryDirectory(prefix="everseg-preview-") as place:
        few = {"max_iterations": _TRIED, "log_every": 1, "checkpoint_every": 10**6}
        small = config.model_copy(
            update={"out": place, "tracker": [], "train": config.train.model_copy(update=few)}
        )
        curves = curves_of(Results(execute(small, quiet=True, dry_run=True)).journal)
    rate = next(iter(curves.speed.values()))["images_per_second"] if curves is not None else 0.0
    each = min(config.train.batch, len(step.train[0].indices)) / rate if rate else 0.0
    iterations, tested = iterations_of(step, config.train), len(step.test[0].indices)
    space, old = step.spaces[step.branch], step.num_old(step.branch)
    labelled = set(step.train[0].lut)
    known = [(space.names[c], c in labelled) for c in range(old) if c != space.background]
    return Preview(
        lines,
        space.names[old:],
        tuple(name for name, there in known if there),
        tuple(name for name, there in known if not there),
        config.method.name,
        iterations,
        each,
        tested,
        # The extended model, the deployed one, and the comparison of both: four passes over the test images.
        iterations * each + 4 * tested * per_image,
    )


def configuration(
    source: Bundle,
    data: str | Path,
    add: Sequence[str],
    method: str | None,
    name: str,
    overrides: Sequence[str] = (),
    model: str | None = None,
    how: How | None = None,
    place: Place | None = None,
) -> RunConfig:
    """Build the configuration of the run that teaches a bundle's model further classes.

    Args:
        how: as for `extend`.
        place: which branch the data take; default the only one.

    Raises:
        ConfigError: the overrides are wrong, or the model has a user-defined architecture and `model` does not name it.
        CheckpointError: the training settings in the bundle cannot be understood.
    """
    recipe = recipe_of(source.lineage, str(source.path))
    train = dict(recipe.get("train", {}))
    if train:  # the new step is a later step, so the settings for later steps replace those of the first
        for key in ("epochs", "lr"):
            following = train.pop(f"{key}_next", None)
            if following:
                train[key] = following
    else:
        train = {
            "lr": RunConfig().train.lr_next,
            "eval_batch": 1,
        }  # its images may differ in size, so each is evaluated alone
    form = source.about.form.settings()
    if form.get("evaluation", "crop") == "crop":
        # A benchmark's test sees the centre of each image. A deployed model sees whole images, as `predict` gives them
        # to it; they may differ in size.
        form["evaluation"], train["eval_batch"] = "whole", 1
    architecture = source.about.architecture
    scenario = recipe.get("scenario", {})
    place = place or Place()
    origin = source.spaces.get(place.like or place.branch or next(iter(source.spaces)))
    several = len(source.spaces) > 1 or place.like is not None
    # Norms that branches share would hold a new place back, or take its statistics and ruin the other branches.
    own = own_norms(architecture) if several else None
    # The images of a memory are of the places before; a batch is of one branch.
    memory = _memory(scenario.pop("memory", None), None if several else read_memory(source.path))
    base = {
        "name": name,
        "data": {**recipe.get("data", {}), **form, "dataset": str(data)},
        "scenario": {
            "protocol": "sequential", **scenario, **memory, "kind": "extension",
            "bundle": str(source.path), "task": [list(add)] if add else [], **asdict(place),
        },
        "model": {"name": configured_name(architecture["name"]), "options": (own or architecture)["options"]},
        "train": {**train, "lr_next": None},
        **({"method": recipe["method"]} if "method" in recipe else {}),
    }  # fmt: skip
    try:
        from_stored(base)
    except ConfigError as error:
        raise CheckpointError(
            f"{source.path}: this everseg does not understand how its model was trained: {error}"
        ) from None
    settings = _settings_of(how, method, source, bool(add), several, place.like is not None)
    without = origin is not None and origin.background is None
    method = method or ("mib" if add and not without and not several else "complete")
    if several and not own and architecture["options"].get("per_branch") not in ("norm", "adapter"):
        # A branch that cannot fit its images by norms of its own pulls more at what all share.
        settings += ["method.shared_lr_scale=0.001"] if method == "complete" else []
    chosen = [f"method={method}", *settings, *([f"model={model}"] if model else []), *overrides]
    config = from_stored(base, chosen)
    if (
        without
        and add
        and config.method.name != "complete"
        and config.method.name in registry.BUILTIN["method"]
    ):
        raise ConfigError(
            f"method '{config.method.name}': the model of {source.path} has no background class, so pixels without a "
            "label would all become the new class. Use method=complete (the default here): there it teaches what the "
            "deployed model is sure of"
        )
    refuse_own_code(config, chosen, named=[str(data)])
    return config


def _settings_of(
    how: How | None, method: str | None, source: Bundle, adds: bool, several: bool, new_branch: bool
) -> list[str]:
    """The settings that a word stands for.

    Args:
        adds: there are new classes.
        several: the model has several branches, the new one included.
        new_branch: the images take a new branch.

    Raises:
        ConfigError: a method is given too, the word is unknown, or the bundle holds no images for "thorough".
    """
    # Where branches cannot have norms of their own, those that they share stay as they are.
    kept = ["method.keep_shared_statistics=true"] if several else []
    if how is None:
        return kept
    if how not in get_args(How):
        raise ConfigError(f"--how: choose one of {', '.join(get_args(How))}, not '{how}'")
    if method is not None:
        raise ConfigError("--how chooses the method already; give only one of --how and --method")
    if how == "thorough" and read_memory(source.path) is None:
        raise ConfigError(
            f"--how thorough trains on images of earlier steps again, and {source.path} holds none; everseg export RUN "
            "--memory puts them into a bundle (scenario.memory), or take --how balanced"
        )
    if how == "thorough" and several:
        raise ConfigError(
            "--how thorough: the images of earlier steps in the bundle are of one place, and the model has several "
            "branches; take --how balanced"
        )
    if how != "quick":
        return kept
    # Of several branches, the trained one's own norms and adapters are what a new place needs.
    frozen = [f"method.freeze_{part}=true" for part in ("encoder", "decoder", *([] if several else ["norm"]))]
    # Everything else stands still, so the new classifier can take larger steps than a whole network.
    faster = ["train.lr_factors.new_heads=10"] if adds else []
    return [*kept, *frozen, *faster, *(["method.freeze_heads=old"] if adds and not new_branch else [])]


def _memory(recipe: Any, memory: Memory | None) -> dict[str, Any]:
    """The settings of the memory: those that the bundle was trained with, if images came with it."""
    if memory is None:
        return {}
    known = recipe if isinstance(recipe, Mapping) else {}
    kept = {key: known[key] for key in ("mix", "share", "labels", "pseudo") if key in known}
    # A list of names belongs to the old data, and the next step may have another method, which chooses nothing.
    selection = (
        known.get("selection") if known.get("selection") in ("ssul", "reservoir", "random") else "ssul"
    )
    return {"memory": {**kept, "size": memory.size, "selection": selection, "keep": "files"}}


def _lines(
    source: Bundle,
    prepared: Prepared,
    data: DataConfig,
    scenario: ScenarioConfig,
    train: TrainConfig,
    network: ModelConfig,
    builder: Any,
    measuring: bool,
) -> Iterator[str]:
    """Say what is known before the training: classes, images, and what the deployed model finds in the new data."""
    (step,) = prepared.steps
    images = step.train[0]
    origin = images.branch if images.branch in source.spaces else str(scenario.like)
    space = source.spaces[origin]
    yield (
        f"bundle: {counted(len(space.names), 'class')} after {counted(source.steps, 'step')}, "
        f"{source.digest[:12]}…; no old data are needed"
    )
    if scenario.domain is not None:
        how = (
            f"goes through the branch '{origin}', with the places that use it already"
            if images.branch == origin
            else f"gets a branch of its own, which begins as a copy of '{origin}'"
        )
        yield f"place:  '{scenario.domain}' {how}; the model has the branches {', '.join(step.spaces)}"
    had, has = (one.get("per_branch") for one in (source.about.architecture["options"], network.options))
    if had != has:
        yield (
            "note:   each branch gets norms and a decoder of its own, equal to those that all share until now. So a "
            "branch can fit its images without moving the others (model.options.per_branch=head shares them as before)"
        )
    if len(step.spaces) > 1 and read_memory(source.path) is not None:
        yield (
            "note:   the bundle's images of earlier steps are not trained on and not passed on: they are of one place, "
            "and the model has several branches"
        )
    # Old classes that the table of the training source maps to their train ids, so their labels are used.
    also = sorted(
        {space.names[i] for i in set(images.lut) if i < space.num_classes and i != space.background}
    )
    labelled = (
        f"labels of {some(also, 6)} are used too (scenario.protocol=overlapped ignores them)"
        if also
        else f"all other pixels are {'ignored' if space.background is None else 'background'}"
    )
    names = step.spaces[images.branch].names[space.num_classes :] or also
    shown = [_showing(prepared, images, one) for one in names]
    yield (
        f"data:   {counted(len(images.indices), 'training image')}, "
        + ", ".join(f"{number} with {name}" for name, number in zip(names, shown, strict=True))
        + f"; {labelled}"
    )
    accelerator = make_accelerator(train.model_copy(update={"threads": None}), training=False)
    seen = seen_in_background(
        source.model(builder), space, replace(images, branch=origin), prepared.datasets, data, accelerator,
        batch=train.eval_batch,
    )  # fmt: skip
    blank = "ignored" if space.background is None else "background"
    if seen:
        listed = ", ".join(f"{name} {percent(share)} %" for name, share in list(seen.items())[:5])
        yield (
            f"check:  the deployed model finds old classes in {percent(sum(seen.values()), digits=0)} % of the "
            f"{blank} pixels ({listed}). These pixels help to keep the old classes."
        )
    else:
        yield (
            f"check:  warning: the deployed model finds none of its classes in the {blank} pixels. "
            "So little in these images helps to keep the old classes."
        )
    if not measuring:
        yield (
            "note:   no labels of old classes are given. Their quality will be estimated by how often the new model "
            "agrees with the deployed one. Errors that both make then count as quality. --old-val DATA measures the "
            "quality instead; DATA may be the new data, if their test images label old classes."
        )


def _showing(prepared: Prepared, source: Source, name: str) -> int:
    """Count the images of a source that show a class."""
    space = prepared.steps[0].spaces[source.branch]
    raws = [raw for raw, train_id in enumerate(source.lut) if train_id == space.names.index(name)]
    pixels = prepared.counts[f"{source.dataset}/{source.split}"][list(source.indices)][:, raws]
    return int((pixels > 0).any(axis=1).sum())


def _pairs(
    folder: RunFolder, index: int, builder: Any, device: torch.device, branches: Iterable[str]
) -> dict[str, Pair]:
    """Load the models before and after the step, and move them to the device: for each branch the two and its classes.

    Args:
        branches: those of the bundle. A branch that the step made is none of them: it has nothing to keep.
    """
    before, old, _, _ = folder.load_final(index - 1, builder)
    after, new, _, _ = folder.load_final(index, builder)
    before, after = before.to(device), after.to(device)
    return {branch: Pair(before, after, old[branch], new[branch], branch) for branch in branches}


def _kept(
    pairs: Mapping[str, Pair],
    prepared: Prepared | None,
    measured_on: Mapping[str, str],
    data: DataConfig,
    scenario: ScenarioConfig,
    accelerator: Accelerator,
    progress: Progress,
    batch: int,
    sketches: Mapping[str, Sketch],
) -> Kept:
    """Measure what is left of each branch where there are data for it, and estimate it where there are none.

    Args:
        prepared: the new data; may be None where all branches are measured.
        measured_on: branch -> data.
        batch: images at once.
        sketches: branch -> the samples of its features that the bundle holds.
    """
    parts = dict[str, Kept]()
    for branch, pair in pairs.items():
        if branch in measured_on:
            old_data = _labelled(data, measured_on[branch])
            parts[branch] = measured(pair, old_data, data, scenario, accelerator, progress, batch=batch)
        else:
            assert prepared is not None
            (test,) = prepared.steps[0].test
            if test.branch != branch:
                test = unlabelled(test, branch, pair.old)
            parts[branch] = estimated(
                pair, test, prepared.datasets, data, accelerator, batch=batch, sketch=sketches.get(branch)
            )
    return together(parts)


def _old_data(old_val: OldVal, source: Bundle) -> dict[str, str]:
    """Branch -> the data that its old classes are measured on.

    Raises:
        ConfigError: it is open which branch is meant, or two are given for one.
    """
    given = [] if old_val is None else [old_val] if isinstance(old_val, str | Path) else list(old_val)
    known = {**{branch: branch for branch in source.spaces}, **source.about.domains}
    found = dict[str, str]()
    for one in map(str, given):
        name, sign, data = one.partition("=")
        if not (sign and name in known):
            if len(source.spaces) > 1:
                raise ConfigError(
                    f"--old-val {one}: the bundle has several branches; say whose classes these data label: "
                    f"--old-val NAME={one}, NAME one of {', '.join(known)}"
                )
            name, data = next(iter(known)), one
        if known[name] in found:
            raise ConfigError(f"--old-val {one}: the branch '{known[name]}' has data already")
        found[known[name]] = data
    return found


def _labelled(data: DataConfig, name: str) -> Dataset:
    """Open the data with labels of old classes, presented as the run's; options belong to the run's own data set."""
    options = data.options if name == data.dataset else {}
    return load_dataset(data.model_copy(update={"dataset": name, "options": options}))


def _write(
    target: Path,
    folder: RunFolder,
    index: int,
    builder: Any,
    kept: Mapping[str, Any],
    onnx: bool,
    images: str | Path | None,
    overrides: Sequence[str],
    memory: bool,
    source: Bundle,
) -> None:
    """Write the new bundle, unless this run has written it already."""
    if is_bundle(target):
        if open_bundle(target).lineage.get("final") != verify(folder.final(index)):
            new_folder(target)  # another model's bundle is there: raises
        return
    contents = of_run(folder, index, builder, kept, memory=memory)
    before, _, _, _ = folder.load_final(index - 1, builder)
    contents.sketch = sketch_of_run(
        folder,
        contents,
        [text for text in overrides if text.startswith("data")],
        before=before,
        old=read_sketch(source.path),
    )
    pictures: list[np.ndarray] = []
    where = ""
    if onnx:
        named = [text for text in overrides if text.startswith("data")]
        pictures, where = (
            images_of(images, contents.form) if images is not None else images_of_run(folder, named)
        )
    write_bundle(target, contents, images=pictures, source=where, onnx=onnx)


def _next_name(path: Path) -> Path:
    """Return the name of the next version of a bundle: b, b-v2, b-v3."""
    path = path if path.name not in ("", "..") else real_path(path)
    match = re.fullmatch(r"(.+)-v(\d+)", path.name)
    return path.with_name(f"{match[1]}-v{int(match[2]) + 1}" if match else f"{path.name}-v2")


def _failed(
    source: Bundle, folder: RunFolder, target: Path, kept: Kept, new: Sequence[Taught], why: str
) -> str:
    """Write the message of a gate that failed."""
    return (
        f"gate: FAIL, {why}.\n"
        f"{capital(kept.text)}.\n{f'New classes: {_new_text(new)}.' if new else 'No new class was taught.'}\n"
        f"No bundle was written. See where they differ: everseg diff {source.path} {folder.path} --images DIR\n"
        f"Write it all the same: everseg export {folder.path} --out {target}"
    )


def _new_text(new: Sequence[Taught]) -> str:
    """The new classes' figures: IoU in percent, and false-positive shares."""
    return "; ".join(one.text for one in new)


def _seen_text(old: Sequence[OnNew]) -> str:
    """IoU of old classes on the new images, before and after, in percent."""
    listed = [f"{one.name} {percent(one.before)} to {percent(one.after)}" for one in old]
    return some(listed, 8)
