"""Training of further classes, or on more images of known ones, into a deployed model, from its bundle alone."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from everseg import registry
from everseg.config.fields import DataConfig, ScenarioConfig
from everseg.data.base import Dataset
from everseg.data.datasets import load_dataset
from everseg.deploy.asked import Asked, How, OldVal, Preview, lines_before, previewed, within
from everseg.deploy.bundle import Bundle, new_folder, open_bundle, open_signed, write_bundle
from everseg.deploy.export import of_run, sketch_of_run
from everseg.deploy.old_classes import (
    Gate,
    Kept,
    Pair,
    estimated,
    measured,
    together,
    unlabelled,
)
from everseg.deploy.onnx import require_onnx
from everseg.deploy.reclass import ClassChanges, ClassEdits, change_classes
from everseg.deploy.trial_images import images_of, images_of_run
from everseg.display import Piece, Result, capital, percent
from everseg.engine.prepare import Prepared, prepare
from everseg.engine.run import execute
from everseg.engine.runtime import make_accelerator
from everseg.errors import ConfigError, GateError, some
from everseg.files import real_path
from everseg.inference.count import user_builder
from everseg.progress import Progress
from everseg.reports.html import NAME as REPORT
from everseg.reports.html import report_at_the_end
from everseg.runs.commit import verify
from everseg.runs.memory import read_memory
from everseg.runs.model_folder import is_bundle
from everseg.runs.results import OnNew, Results, StepResults, Taught
from everseg.runs.run_folder import RunFolder
from everseg.runs.sketch import Sketch, read_sketch


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
    source = open_signed(bundle, require_signature)
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
    asked = Asked(source, data, tuple(add), method, how, tuple(overrides), model)
    asked = asked.at(domain, like, shared, Progress(quiet=quiet))
    asked = within(budget, asked, target.name, Progress(quiet=quiet))
    return _extended(asked, target, gate, _old_data(old_val, source), with_onnx, images, quiet)


def _extended(
    asked: Asked,
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
        for line in lines_before(
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
    source, edits = open_signed(bundle, require_signature), ClassEdits.of(drop, merge, rename)
    Gate(keep_at_least, keep_each_at_least)  # judged after the training; a share that is none is told now
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
        asked = Asked(source, data, tuple(add), method, how, tuple(overrides), model)
        asked = asked.at(domain, like, shared, progress)
        return previewed(within(budget, asked, None, progress), progress, measuring=old_val is not None)


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
