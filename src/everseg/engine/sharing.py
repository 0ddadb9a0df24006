"""Train a first step once and share it between runs that have it in common.

Two runs have the same first step if everything that acts in it is the same: all settings except those of later steps,
and what the method does in a first step. Methods declare nothing for this: `behaviour` tries them on a tiny network.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from everseg import registry
from everseg.config.fields import RunConfig
from everseg.config.loading import identity
from everseg.data.writing import flush_folder, write_flushed
from everseg.display import counted
from everseg.engine.step import train_batch
from everseg.errors import CheckpointError, DataError
from everseg.labels import IGNORED, LabelSpace
from everseg.methods import switches
from everseg.methods.base import Method, StepContext
from everseg.methods.build import build_method
from everseg.models.compensation import Compensated, Unit
from everseg.models.model import SegmentationModel
from everseg.runs.commit import verify, write_bytes, writing
from everseg.runs.journal import Journal, replaced_samples
from everseg.runs.lock import locked
from everseg.runs.run_folder import RunFolder
from everseg.runs.versions import versions
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

LATER_STEPS = ("train.epochs_next", "train.lr_next")
"""Settings that act after the first step only."""
_COPIED = ("images.npz", "boundary.npz", "confusion.npz", "metrics.json")
_PACKAGES = ("everseg", "torch", "numpy", "pillow", "accelerate")
"""Packages that decide the bits of a result: another version may give other bits."""


def first_step_hash(config: RunConfig) -> str | None:
    """Hash (SHA-256) everything that decides a run's first step. None means that the step is never shared.

    Joint runs are not shared because they have a single step. Scenarios that the user wrote are not shared because they
    may train several branches in the first step.
    """
    if config.scenario.joint or config.scenario.kind not in registry.BUILTIN["scenario"]:
        return None
    settings = {key: value for key, value in _settings(config).items() if not key.startswith("method.")}
    told: list[Any] = [settings, behaviour(build_method(config.method))]
    # Where a method chooses the images that its memory keeps, the trial does not show which.
    memory = config.scenario.memory
    if memory.size and (memory.selection == "method" or memory.pseudo is not None):
        told.append(config.method.model_dump(mode="json"))
    # Another place of the same maps may hold others; only a run knows their hashes.
    told += [
        extra for extra in (config.data.extra, *(d.extra for d in config.data.domains.values())) if extra
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=repr).encode()).hexdigest()


def behaviour(method: Method) -> tuple[Any, ...]:
    """Describe what a method does in a first step. Methods of equal value give weights that are equal to the last bit.

    A built-in method trains a tiny network for a few updates. The images are made up, some pixels are ignored, and the
    trial runs with and without class weights. If the method leaves no state for later steps, the value stands for the
    trained network: weights, statistics, frozen parameters. Things that act only from the second step on, such as the
    teacher or the weight of a distillation term, do not change this value. So they do not prevent sharing, and nobody
    has to keep a list of them.

    Two kinds of methods share only with runs of the same class and hyper-parameters: methods that gather state in their
    first step, and methods that the user wrote, which may do something that the trial does not show.
    """
    cls = type(method)
    values = [(f.name, getattr(method, f.name)) for f in fields(cls) if f.init]
    itself = (f"{cls.__module__}:{cls.__qualname__}", *values)
    if not cls.__module__.startswith("everseg.methods."):
        return itself
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the number of threads decides how sums are rounded, and may change between two trials
    try:
        tried = [_tried(deepcopy(method), weights) for weights in ({}, {"default": (0.5, 1.0, 2.0)})]
    finally:
        torch.set_num_threads(threads)
    return itself if None in tried else ("tried", *tried)


class _TrialEncoder(Compensated):
    """A convolution and a norm with new ones beside them, which RCIL asks for, and a weight that nothing uses.

    The unused weight shows whether a method leaves an absent gradient absent or sets it to 0.
    """

    conv_new: nn.Module
    norm_new: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.unused = nn.Parameter(torch.ones(2))
        self.compensate(Unit(("conv",), "norm"))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        old, new = self.norm(self.conv(image)), self.norm_new(self.conv_new(image))
        return {"layer1": torch.relu(self.combined(old, new))}


class _TrialDecoder(nn.Module):
    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.conv(features["encoder"])


@torch.random.fork_rng(devices=[])
def _tried(method: Method, class_weights: Mapping[str, tuple[float, ...]]) -> str | None:
    """Train the trial's network with a method and hash the result (SHA-256); None if the method keeps state of it."""
    torch.manual_seed(0)
    model = SegmentationModel(_TrialEncoder(), _TrialDecoder())
    source = Source("default", "trial", "train", (0, 1), bytes(256))
    space = LabelSpace(((0, 1, 2),), ("background", "a", "b"))
    step = Step(
        0,
        (source,),
        (),
        {"default": space},
        {"default": 3},
        class_weights=class_weights,
        to_come={"default": (1, 2)},
    )
    # A method that is not trained by gradients alone gathers state in the first step, or stands for itself as well.
    if method.accumulates(step) is not None or not method.trains(step):
        return None
    method.prepare_model(model, step)
    groups = method.param_groups(model, step)
    rates = [(group["lr_scale"], len(group["params"])) for group in groups]
    # With momentum and weight decay an absent gradient and a gradient of 0 lead to different weights.
    optimizer = torch.optim.SGD(
        [{"params": group["params"], "lr": 0.1 * group["lr_scale"]} for group in groups],
        momentum=0.9,
        weight_decay=0.1,
    )
    image = torch.randn(2, 3, 8, 8)  # (B, 3, H, W)
    label = torch.arange(2 * 8 * 8).view(2, 8, 8) % 4  # (B, H, W): classes 0 to 2; 3 becomes an ignored pixel
    extra = dict.fromkeys(method.needs_extra, (label + 1) % 2)
    batch = Batch(image, label.masked_fill(label == 3, IGNORED), "default", ("0", "1"), extra=extra)
    ctx = StepContext(
        step=step,
        model=model,
        module=model,
        teacher=None,
        train_batches=lambda: iter((batch,)),
        epoch_batches=lambda: iter((batch,)),
    )
    switches.begin(method, ctx)
    model.train()
    for _ in range(3):
        train_batch(method, batch, ctx, optimizer)
    switches.finish(method, ctx)
    if method.state_dict():
        return None
    frozen = [(name, weight.requires_grad) for name, weight in model.named_parameters()]
    told = (
        safetensors.torch.save(model.state_dict())
        + repr((rates, frozen, model.describe(), model.readout)).encode()
    )
    return hashlib.sha256(told).hexdigest()


def has_first_step(folder: RunFolder) -> bool:
    """Tell whether a run's first step is trained and scored."""
    return (folder.step(0) / "metrics.json").is_file()


def obstacle(source: RunFolder, threads: int) -> str:
    """Say why this machine would train a first step to other bits although the settings agree; "" if it would not."""
    record = source.record()
    if record.threads != threads:
        return f"{source.path.name} was trained with {record.threads} CPU threads, not {threads}"
    others = [name for name, here in versions(*_PACKAGES).items() if record.versions.get(name) != here]
    return f"{source.path.name} was trained with another version of {', '.join(others)}" if others else ""


def share_first_step(source: RunFolder, target: RunFolder, skip_bad: int = 0) -> bool:
    """Copy the finished first step of one run to another run, as if the other run had trained it itself.

    The copy holds weights, method state, counts, scores, and the lines of the journal that belong to the step.

    Args:
        source: a run whose first step is trained and scored.
        target: a run with the same `first_step_hash`.
        skip_bad: the target's `data.skip_bad`. The source may have replaced at most that many training samples.

    Returns:
        Whether the step was copied. False if the target has a first step already, or was begun with other settings.

    Raises:
        CheckpointError: the source is damaged, or the copy cannot be written.
        DataError: the source replaced more training samples than the target may.
        ConfigError: the target is in use by another process.
    """
    if target.step(0).exists():
        return False
    replaced = len(replaced_samples(Journal(source.path / "journal.jsonl").lines(), step=0))
    if replaced > skip_bad:
        raise DataError(
            f"{source.path.name} replaced {counted(replaced, 'unreadable training sample')} in its first step, "
            f"and data.skip_bad allows {skip_bad}"
        )
    digest = verify(source.final(0))
    source.metrics(0), source.counts(0), source.images(0)  # these raise if a file is damaged
    with locked(target.path):
        # Another process may have made the step before this one got the lock.
        if target.step(0).exists() or _is_of_another(target, source):
            return False
        temporary = target.step(0).with_name("00.tmp")
        with writing(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            _copy_flushed(source, temporary)
            if verify(temporary / "final") != digest:
                raise CheckpointError(
                    f"{temporary} is not what {source.step(0)} holds; run the same command again"
                )
            journal = Journal(source.path / "journal.jsonl")
            # The rename comes last: a step folder that exists is complete, its journal included.
            write_bytes(target.path / "journal.jsonl", journal.of_step(0))
            temporary.rename(target.step(0))
            flush_folder(target.step(0).parent)
    return True


def _is_of_another(target: RunFolder, source: RunFolder) -> bool:
    if not target.is_begun:
        return False
    theirs, ours = target.config(), source.config()
    if all(registry.is_builtin("method", config.method.name) for config in (theirs, ours)):
        return first_step_hash(theirs) != first_step_hash(ours)
    # `behaviour` would have to import and run a method that the user wrote, and a name in a run folder is no
    # permission to do that. Runs with such methods share only if their settings are equal, so settings are enough.
    return _settings(theirs) != _settings(ours)


def _settings(config: RunConfig) -> dict[str, Any]:
    settings = {key: value for key, value in identity(config).items() if key not in LATER_STEPS}
    # Further scores cannot change the model, but a copied step would lack those that its run did not ask for.
    return settings | ({"metrics": sorted(config.metrics)} if config.metrics else {})


def _copy_flushed(source: RunFolder, target: Path) -> None:
    """Copy a finished first step without its checkpoints, and flush every file to disk."""
    root = source.step(0)
    files = [*source.final(0).iterdir(), *(root / name for name in _COPIED if (root / name).is_file())]
    for path in files:
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(place, path.read_bytes())
    flush_folder(target / "final")
    flush_folder(target)
