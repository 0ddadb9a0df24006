"""What an extension of a deployed model is asked for: place, method, time, and the configuration of its run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from accelerate import PartialState

from everseg import registry
from everseg.config.fields import DataConfig, ModelConfig, RunConfig, ScenarioConfig, TrainConfig
from everseg.config.loading import difference, from_stored, refuse_own_code
from everseg.deploy.bundle import Bundle
from everseg.deploy.export import recipe_of
from everseg.deploy.old_classes import (
    LOOKED,
    fit,
    seen_in_background,
)
from everseg.display import Piece, Result, counted, percent
from everseg.engine.prepare import Prepared, prepare
from everseg.engine.run import execute
from everseg.engine.runtime import make_accelerator
from everseg.engine.step import iterations_of
from everseg.errors import CheckpointError, ConfigError, DataError, some
from everseg.inference.count import user_builder
from everseg.models.build import configured_name
from everseg.progress import Progress, seconds_of, time_text
from everseg.reports.figures import curves_of
from everseg.runs.memory import Memory, read_memory
from everseg.runs.model_edits import check_branch_name, own_norms
from everseg.runs.model_folder import sizes_of_weights
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Source

How = Literal["quick", "balanced", "thorough"]
"""How thoroughly a model is extended, in a word."""
OldVal = str | Path | Sequence[str] | None
"""What `--old-val` names: data, or "NAME=DATA" for each of several branches."""
TRIED = 6
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
            f"{self.seconds_per_iteration:.2g} s (the median of {TRIED}, measured now), and the tests on "
            f"{counted(self.test_images, 'image')}"
        )
        yield "dry run: nothing was kept"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where the images of an extension come from, and which branch they take; see `ScenarioConfig`."""

    domain: str | None = None
    branch: str | None = None
    like: str | None = None


@dataclass(frozen=True)
class Asked:
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

    def at(self, domain: str | None, like: str | None, shared: bool, progress: Progress) -> Asked:
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


def within(budget: str | None, asked: Asked, name: str | None, progress: Progress) -> Asked:
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
        seen = previewed(one, Progress(quiet=True), measuring=True)
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


def previewed(asked: Asked, progress: Progress, measuring: bool) -> Preview:
    """Make the preview of an extension.

    Args:
        measuring: labels of old classes are at hand.
    """
    source, config = asked.source, asked.configuration("preview")
    builder = user_builder(config.model)
    prepared = prepare(config.data, config.scenario, progress, seed=config.seed)
    (step,) = prepared.steps
    began = perf_counter()
    told = lines_before(
        source, prepared, config.data, config.scenario, config.train, config.model, builder, measuring
    )
    lines = tuple(told)
    # The check of the background has sent some training images through the deployed model: what a test costs, too.
    looked = min(LOOKED, len(step.train[0].indices))
    per_image = (perf_counter() - began) / looked
    with tempfile.TemporaryDirectory(prefix="everseg-preview-") as place:
        few = {"max_iterations": TRIED, "log_every": 1, "checkpoint_every": 10**6}
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
    own = own_norms(architecture, sizes_of_weights(source.path)) if several else None
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
        # A branch that cannot fit its images by norms of its own pulls more at what all share. The overrides may name
        # another method, which need not know this option.
        last = [method, *(text.removeprefix("method=") for text in overrides if text.startswith("method="))]
        settings += ["method.shared_lr_scale=0.001"] if last[-1] == "complete" else []
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
    # Little else moves, so the new classifier can take larger steps than a whole network.
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


def lines_before(
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
        elsewhere = images.branch != origin
        what = f"labelled images of the place before ('{origin}')" if elsewhere else "labels of old classes"
        named = f"{origin}=DATA" if len(step.spaces) > 1 else "DATA"
        same = "" if elsewhere else "; DATA may be the new data, if their test images label old classes"
        yield (
            f"note:   no {what} are given. Their quality will be estimated by how often the new model agrees with the "
            f"deployed one. Errors that both make then count as quality. --old-val {named} measures the quality "
            f"instead{same}."
        )


def _showing(prepared: Prepared, source: Source, name: str) -> int:
    """Count the images of a source that show a class."""
    space = prepared.steps[0].spaces[source.branch]
    raws = [raw for raw, train_id in enumerate(source.lut) if train_id == space.names.index(name)]
    pixels = prepared.counts[f"{source.dataset}/{source.split}"][list(source.indices)][:, raws]
    return int((pixels > 0).any(axis=1).sum())
