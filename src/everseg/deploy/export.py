"""Export of a finished run or a model folder as a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everseg.config.fields import RunConfig
from everseg.config.loading import config_hash, to_json
from everseg.deploy.bundle import Bundle, Contents, new_folder, open_bundle, write_bundle, write_reduced
from everseg.deploy.feature_sketch import as_inputs, renewed
from everseg.deploy.memory import bundled_memory
from everseg.deploy.onnx import require_onnx
from everseg.deploy.precisions import MAX_DROP, Trial, asked_precisions, reducer, trials_of, trials_of_run
from everseg.deploy.trial_images import (
    SKETCHED,
    generated,
    images_of,
    images_of_run,
    shown_in_tests,
    shown_in_training,
)
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.labels import LabelSpace
from everseg.models.branch_choice import features_of, needs_statistics
from everseg.models.domain_statistics import statistics_of
from everseg.models.model import SegmentationModel
from everseg.runs import command
from everseg.runs.commit import load_tensors, parent_of, verify
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import (
    LINEAGE,
    Registry,
    is_bundle,
    load_model,
    read_lineage,
    read_model_file,
)
from everseg.runs.place import model_folder_at, what_is
from everseg.runs.results import StepResults
from everseg.runs.run_folder import RunFolder
from everseg.runs.sketch import Sketch

RECIPE: dict[str, tuple[str, ...]] = {
    "data": ("transform", "crop", "size", "shift", "shift_fill", "scale", "flip", "scale_range",
             "vertical_flip", "rotate", "brightness", "contrast", "saturation", "hue", "blur", "evaluation",
             "normalisation", "window", "overlap"),
    # Not the label policy: how a benchmark reads void and classes to come is no property of the model.
    "scenario": ("memory",),
    "train": (
        "epochs", "epochs_next", "batch", "accumulate", "lr", "lr_next", "schedule", "schedule_by", "power",
        "step_size", "step_factor", "min_lr", "warmup", "warmup_share", "warmup_from", "warmup_power", "optimizer",
        "betas", "momentum",
        "nesterov", "weight_decay", "decay_norms", "lr_factors", "layer_decay", "clip_norm", "ema", "precision",
    ),
}  # fmt: skip
"""Settings that the next step takes over by default."""
OWN = ("freeze_encoder", "freeze_decoder", "freeze_norm", "freeze_heads")
"""Options of a method that an extension's word sets (`--how quick`). The next extension is asked anew how it goes."""
MEASURED = 64
"""Training images that a branch is measured on at the export. Of CamVid's 305 by day as many choose as well as all."""


def export(
    path: str | Path,
    out: str | Path | None = None,
    *,
    step: int | None = None,
    images: str | Path | None = None,
    onnx: bool = True,
    memory: bool = False,
    precision: Sequence[str] = (),
    calibrate: str | Path | None = None,
    max_drop: float = MAX_DROP,
    overrides: Sequence[str] = (),
    builder: Any = None,
) -> Bundle:
    """Write a finished step as a bundle, which needs no other files.

    It contains no pixel of the training data, unless `memory` asks for it.

    Args:
        path: run folder, or a model folder (`final`, also of an imported checkpoint). With `precision` also a bundle: a
            copy of it is written that has these files.
        out: a new folder; default `bundle` in the run's folder, or `bundle-step-N` there if `step` is given.
        step: which step of a run; default the last finished one.
        images: folder of images for comparing the ONNX file with the model. By default these are the run's test images
            if they can be read, else generated images.
        onnx: write the ONNX file (needs the extra `export`).
        memory: put the images of the run's memory into the bundle, with the labels that they were stored with. The
            model card says so, and `extend` trains on them again. The run must keep copies
            (scenario.memory.keep=files).
        precision: smaller ONNX files beside the full one: "fp16" (half precision) and "int8" (quantised). They are
            measured against the full one.
        calibrate: data for that: a data.yaml or a data set's name (training images to calibrate, the split
            `scenario.test_split` to measure), or a folder of images. Default the run's own data.
        max_drop: points of mIoU (without labels: of pixels with the same class) that a smaller file may lose.
        overrides: the present place of the run's data, `data.root=DIR`; of `calibrate` where that is given.
        builder: the builder of your own architecture, if the model is not a built-in one. It is never imported
            automatically.

    Raises:
        ConfigError: the folder exists, packages of the extra are missing, or the architecture cannot be exported to
            ONNX.
        CheckpointError: there is no finished step, the model is damaged, or the files cannot be written.
        GateError: the ONNX file gives other results than the model, or a smaller one loses more than `max_drop`.
            Nothing is written.
    """
    path = Path(path)
    is_run = RunFolder(path).is_begun
    smaller = asked_precisions(precision, onnx)
    if smaller:
        require_onnx()
    elif calibrate is not None:
        raise ConfigError("--calibrate: it is for smaller ONNX files; say which ones (--precision fp16,int8)")
    if not is_run:
        if is_bundle(path):
            strange = {"--step": step is not None, "--images": images is not None, "--memory": memory}
            if smaller and (given := [option for option, asked in strange.items() if asked]):
                raise ConfigError(
                    f"{', '.join(given)}: {path} is a bundle, whose copy has the same model, memory and full ONNX "
                    "file; leave it out, or export the run"
                )
            return _copied(path, out, smaller, calibrate, max_drop, overrides, builder)
        model_folder_at(path)  # a path that is wrong is told before anything else
    if out is None:
        if not is_run:
            raise ConfigError(
                f"--out FOLDER: give the new bundle a place; only the bundle of a run has one of its own ({path} "
                f"{what_is(path)})"
            )
        out = path / ("bundle" if step is None else f"bundle-step-{step}")
    new_folder(out)
    if onnx:
        require_onnx()
    if is_run:
        folder = RunFolder(path)
        index = folder.chosen_step(step)
        contents = of_run(folder, index, builder, memory=memory)
        contents.sketch = sketch_of_run(folder, contents, overrides)
        _measure_branches(folder, index, contents, overrides)
    elif memory:
        raise ConfigError("--memory: a model folder does not say what its masks mean; give the run's folder")
    else:
        contents = _of_model(path, builder)
    reduce = None
    if smaller:
        trials = _trials(path if is_run else None, calibrate, contents, overrides)
        reduce = reducer(smaller, trials, max_drop)
        # Overrides that place the data to calibrate on say nothing of the run's own.
        overrides = overrides if calibrate is None else ()
    pictures: list[np.ndarray] = []
    source = ""
    if onnx and images is not None:
        pictures, source = images_of(images, contents.form)
    elif onnx:
        pictures, source = (
            images_of_run(RunFolder(path), overrides) if is_run else generated(contents.form.channels)
        )
    return write_bundle(out, contents, images=pictures, source=source, onnx=onnx, reduce=reduce)


def _copied(
    path: Path,
    out: str | Path | None,
    smaller: Sequence[str],
    calibrate: str | Path | None,
    max_drop: float,
    overrides: Sequence[str],
    builder: Any,
) -> Bundle:
    """Write a copy of a bundle that has smaller ONNX files."""
    if not smaller:
        raise ConfigError(
            f"{path} is a bundle already, so there is nothing to export; copy the folder instead (--precision int8 "
            "adds a smaller ONNX file to a copy)"
        )
    if out is None or calibrate is None:
        lacks = [
            text
            for text, given in (("-o FOLDER for the copy", out), ("--calibrate DATA", calibrate))
            if given is None
        ]
        raise ConfigError(
            f"{path} is a bundle, which is never changed and names no data: give {' and '.join(lacks)}"
        )
    new_folder(out)
    bundle = open_bundle(path)
    trials = trials_of(calibrate, bundle.spaces, bundle.about.form, overrides)
    return write_reduced(bundle, out, reducer(smaller, trials, max_drop), builder)


def _trials(
    run: Path | None, calibrate: str | Path | None, contents: Contents, overrides: Sequence[str]
) -> dict[str, Trial]:
    """Find the images for smaller files: those that are named, or the run's own."""
    if calibrate is not None:
        return trials_of(calibrate, contents.spaces, contents.form, overrides)
    if run is None:
        raise ConfigError(
            "--precision measures on images, and a model folder names none: give --calibrate DATA"
        )
    return trials_of_run(RunFolder(run), contents.spaces, contents.domains, overrides)


def of_run(
    folder: RunFolder,
    index: int,
    builder: Any = None,
    kept: Mapping[str, Any] | None = None,
    *,
    memory: bool = False,
) -> Contents:
    """Collect the contents of a bundle from a finished step of a run.

    Args:
        builder: as for `export`.
        kept: the quality of the old classes after the last step; it is added to the history.
        memory: as for `export`.
    """
    model, spaces, state, digest = folder.load_final(index, builder)
    recorded = {entry["index"]: entry for entry in folder.scenario()["steps"]}
    config = folder.config()
    begin = folder.final(min(recorded) - 1) if min(recorded) else None
    before, parent, history = None, None, []
    if begin is not None:  # the run began from a bundle; a copy of it is the run's first parent
        before, parent = read_model_file(begin).lasting_ids(begin), parent_of(begin)
        history = list(read_lineage(begin)["history"])
    # A fresh model was not trained in the earlier steps, so only its own step belongs to its history.
    fresh = folder.is_fresh(index)
    own = [i for i in sorted(recorded) if i <= index and (not fresh or i == index)]
    extends = config.scenario.kind == "extension"
    history += [_history(folder, i, recorded[i], config.name, config.method.name, extends) for i in own]
    if extends and parent is not None:
        history[-1]["extends"] = parent
    if kept is not None:
        history[-1]["kept"] = dict(kept)
    grown = [i for i in own if any(recorded[i]["grows"].values())]
    growth = model.describe()["growth"]
    about = folder.about(index)
    steps = grown
    if (
        before is not None
    ):  # its classes keep the steps that its registry gives them, so these numbers are not read
        steps = [*[0] * (len(growth) - len(grown)), *grown]
    return Contents(
        model,
        spaces,
        state,
        form=about.form,
        domains=_domains(folder.branch_of(index), begin, bool(config.data.domains or config.scenario.domain)),
        steps=steps if len(steps) == len(growth) else range(len(growth)),
        before=before,
        parent=parent,
        lineage={
            "final": digest,
            "steps": index + 1,
            "run": {
                "name": config.name,
                "config_hash": config_hash(config),
                "seed": config.seed,
                "command": command.text(folder.record().argv),
            },
            "method": config.method.name,
            "recipe": recipe(config, {} if begin is None else recipe_of(read_lineage(begin), str(begin))),
            "history": history,
        },
        unknown=about.unknown,
        memory=bundled_memory(folder, index, recorded, spaces) if memory else None,
    )


def sketch_of_run(
    folder: RunFolder,
    contents: Contents,
    overrides: Sequence[str] = (),
    *,
    before: SegmentationModel | None = None,
    old: Mapping[str, Sketch] | None = None,
) -> Callable[[Registry], Mapping[str, Sketch]] | None:
    """Make what samples the features of a finished model on test images of its run; None where these cannot be read.

    Args:
        before: as for `renewed`.
        old: as for `renewed`.
    """
    try:
        shown = shown_in_tests(folder, overrides, SKETCHED)
    except (ConfigError, DataError):
        return None
    branch_of = folder.branch_of(folder.finished_steps[-1])
    only = next(iter(branch_of.values()))
    images: dict[str, list[np.ndarray]] = {}
    for key, each in shown.items():
        images.setdefault(branch_of.get(key, only), []).extend(each)
    return partial(_renewed, contents.model, contents.spaces, images, contents.form, before, old)


def _measure_branches(folder: RunFolder, index: int, contents: Contents, overrides: Sequence[str]) -> None:
    """Measure what the training images of branches look like where the run has not.

    A run of one branch needs no choice, and does not spend time on it. But the bundle may be extended to a new domain
    when these images are gone, and then the choice needs statistics of both.
    """
    model = contents.model
    if not needs_statistics(model):
        return
    found: dict[str, list[Tensor]] = {}
    try:
        branch_of = folder.branch_of(index)
        shown = shown_in_training(folder, overrides, MEASURED)
        # A data set without domains goes by a name of its own. A domain of later steps has no branch yet.
        only = model.branches[0] if len(model.branches) == len(shown) == 1 else ""
        for key, images in shown.items():
            branch = branch_of.get(key, only)
            if branch in model.branches and branch not in model.domain_statistics:
                features = (features_of(model, image) for image in as_inputs(images, contents.form))
                found.setdefault(branch, []).extend(features)
    except (ConfigError, DataError):  # the images are elsewhere: the bundle does without
        return
    model.domain_statistics |= {
        branch: statistics_of(torch.cat(each)) for branch, each in found.items() if each
    }


def _renewed(
    model: SegmentationModel,
    spaces: Mapping[str, LabelSpace],
    images: Mapping[str, Sequence[np.ndarray]],
    form: InputForm,
    before: SegmentationModel | None,
    old: Mapping[str, Sketch] | None,
    registry: Registry,
) -> Mapping[str, Sketch]:
    return renewed(model, spaces, registry, images, form, before=before, old=old)


def _domains(found: Mapping[str, str], begin: Path | None, named: bool) -> Mapping[str, str]:
    """Domain -> branch that its images take; {} for a model of one data set.

    Args:
        found: name of the last step's results -> branch.
        begin: the folder of the model that the run began with, if it extended one.
        named: whether the names of the results are those of domains.
    """
    if begin is None:
        return found if named else {}
    before = read_model_file(begin)
    if not named:
        return before.domains
    return {**(before.domains or {branch: branch for branch in before.spaces}), **found}


def recipe(config: RunConfig, before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Collect the settings that the next step takes over.

    Args:
        before: what the bundle handed on that the run extended; {} if it extended none. What a word of `extend` sets
            is handed on as it was there.
    """
    whole = to_json(config)
    method = dict(whole["method"])
    if config.scenario.kind == "extension":
        origin = before.get("method", {})
        same = origin.get("name") == method["name"]
        method = {key: value for key, value in method.items() if key not in OWN}
        method |= {key: origin[key] for key in OWN if same and key in origin}
        rates = before.get("train", {}).get("lr_factors") or {}
        whole["train"]["lr_factors"] = {**whole["train"]["lr_factors"], "new_heads": rates.get("new_heads")}
    return {section: {key: whole[section][key] for key in keys} for section, keys in RECIPE.items()} | {
        "method": method
    }


def recipe_of(lineage: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Read the settings that a bundle passes on to its next step. Empty if everseg did not train the model.

    Only the keys of RECIPE and the method are read. A bundle may come from somebody else, so it must not choose the
    data or the folders of the next run.

    Args:
        where: name of the bundle, for the error message.

    Raises:
        CheckpointError: a section is not a mapping of settings.
    """
    stored = lineage.get("recipe") or {}
    known = [name for name in (*RECIPE, "method") if name in stored] if isinstance(stored, Mapping) else None
    if known is None or not all(isinstance(stored[name], Mapping) for name in known):
        raise CheckpointError(
            f"{where} is damaged: the recipe in {LINEAGE} is not made of settings; restore the bundle"
        )
    return {
        name: {key: value for key, value in stored[name].items() if name == "method" or key in RECIPE[name]}
        for name in known
    }


def _history(
    folder: RunFolder, index: int, recorded: Mapping[str, Any], run: str, method: str, extends: bool
) -> dict[str, Any]:
    """Describe a step: its new classes, the numbers and hashes of its images, and its scores.

    Args:
        extends: the step extended a deployed model; then false-positive shares stand beside the scores of its classes.
    """
    results = StepResults(folder, index)
    scores = results.scores
    images = {
        role: [
            {
                "data": f"{source['dataset']}/{source['split']}",
                "images": source["images"],
                "sha256": source["sha256"],
            }
            for source in recorded[role]
        ]
        for role in ("train", "test")
    }
    taught: dict[str, dict[str, Any]] = {}
    if extends:
        taught = {
            name: {
                "taught": [asdict(one) for one in results.taught(name, entry["new_classes"])],
                "old": [asdict(one) for one in results.old_on_new(name)],
            }
            for name, entry in scores.items()
        }
    return {
        "step": index,
        "run": run,
        "method": method,
        "classes": list(dict.fromkeys(name for entry in scores.values() for name in entry["new_classes"])),
        **images,
        "scores": {
            name: {
                "miou": entry["miou"],
                "miou_without_background": entry["miou_without_background"],
                "class_iou": {
                    **dict(zip(entry["classes"], entry["class_iou"], strict=True)),
                    # Of a model without background these count what else is called so, too.
                    **{one["name"]: one["iou"] for one in taught.get(name, {}).get("taught", ())},
                },
                **taught.get(name, {}),
            }
            for name, entry in scores.items()
        },
    }


def _of_model(path: Path, builder: Any) -> Contents:
    """Collect the contents of a bundle from a model folder: an imported checkpoint or a step's `final`."""
    path = model_folder_at(path)
    digest = verify(path)
    model, about = load_model(path, builder)
    return Contents(
        model,
        about.spaces,
        load_tensors(path / "method_state.safetensors"),
        form=about.form,
        domains=about.domains,
        lineage={"final": digest, "source": about.source or f"model folder {path.name}"},
        unknown=about.unknown,
    )
