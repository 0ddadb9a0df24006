"""The run folder: where what lies, and how a finished step is read back."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everseg.config.fields import RunConfig
from everseg.config.loading import config_hash, difference, from_stored, to_json
from everseg.data.writing import remove_leftovers
from everseg.errors import CheckpointError, ConfigError
from everseg.labels import LabelSpace
from everseg.metrics import sums_of
from everseg.models.model import SegmentationModel
from everseg.runs import command
from everseg.runs.commit import (
    load_tensors,
    parent_of,
    read_document,
    verify,
    write_bytes,
    write_json,
    writing,
)
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import ModelFile, load_model, read_model_file, save_model
from everseg.scenarios.steps import Step

RECORD = "run.json"
MOST_THREADS = 4096


@dataclass(frozen=True)
class RunRecord:
    """What run.json says: how a run was asked for, and on what it was begun."""

    config: Any
    """The configuration as it was written, not checked: `RunFolder.config` does that."""
    threads: int
    """CPU threads."""
    hash: str = ""
    """SHA-256 of the settings that decide the result."""
    argv: tuple[str, ...] = ()
    """The command, word by word; () where the run was started from Python."""
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and documents of one run."""

    path: Path

    def step(self, index: int) -> Path:
        return self.path / "steps" / f"{index:02d}"

    def final(self, index: int) -> Path:
        return self.step(index) / "final"

    def checkpoints(self, index: int) -> Path:
        return self.step(index) / "ckpt"

    @property
    def finished_steps(self) -> list[int]:
        """Indices of the steps that are trained and scored, in order."""
        names = (path.parent.name for path in self.path.glob("steps/[0-9]*/metrics.json"))
        return sorted(int(name) for name in names if name.isdigit())

    def is_finished(self, config: RunConfig) -> bool:
        """Whether every step of this very run is trained and scored."""
        if not (self.path / "scenario.json").is_file() or difference(self.config(), config):
            return False
        return len(self.finished_steps) == len(read_document(self.path / "scenario.json", "steps")["steps"])

    def chosen_step(self, step: int | None) -> int:
        """The step a user asked for; the last finished one by default.

        Raises:
            CheckpointError: no step is finished.
            ConfigError: that step is not finished.
        """
        finished = self.finished_steps
        if not finished:
            raise CheckpointError(f"{self.path} has no finished step yet; run its command to finish one")
        if step is not None and step not in finished:
            raise ConfigError(
                f"--step {step}: finished steps of {self.path} are {', '.join(map(str, finished))}"
            )
        return finished[-1] if step is None else step

    def spaces(self, index: int) -> dict[str, LabelSpace]:
        """Label space of each branch after a step.

        Raises:
            CheckpointError: the file is damaged.
        """
        return dict(self.about(index).spaces)

    def branch_of(self, index: int) -> dict[str, str]:
        """Name of the results of a scored step (domain, or branch in runs on one data set) -> branch they are of."""
        return {name: scores.get("branch", name) for name, scores in self.metrics(index)["branches"].items()}

    def is_fresh(self, index: int) -> bool:
        """Whether a finished step was trained from scratch.

        Raises:
            CheckpointError: the file is damaged.
        """
        return self.about(index).fresh

    def about(self, index: int) -> ModelFile:
        """What is known of a finished step's model.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_model_file(self.final(index))

    @property
    def is_begun(self) -> bool:
        """Whether a run was ever begun here: its run.json is there."""
        return (self.path / RECORD).is_file()

    def record(self) -> RunRecord:
        """What run.json says.

        Raises:
            CheckpointError: not a run folder, or its run.json is damaged.
        """
        path = self.path / RECORD
        if not path.is_file():
            raise CheckpointError(
                f"{self.path} is not a run folder (no run.json); give the folder a run was written to"
            )
        stored = read_document(path, "config", "threads")
        threads, versions, argv = stored["threads"], stored.get("versions") or {}, stored.get("argv") or []
        texts = {key: stored.get(key) or "" for key in ("hash", "machine")}
        problems = [f"{key}: expected text" for key, value in texts.items() if not isinstance(value, str)]
        if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
            problems.append(f"threads: expected a whole number from 1 to {MOST_THREADS}")
        if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
            problems.append("versions: expected the version of each package")
        if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
            problems.append("argv: expected the words of a command")
        if problems:
            raise CheckpointError(
                f"{path} is damaged: {'; '.join(problems)}; restore it or start again under another name"
            )
        return RunRecord(stored["config"], threads, argv=tuple(argv), versions=versions, **texts)

    def config(self, record: RunRecord | None = None) -> RunConfig:
        """The configuration the run was started with; code that it names is not imported.

        Args:
            record: what `record` gave, if it was read before.

        Raises:
            CheckpointError: not a run folder, or its run.json is damaged or of another everseg.
        """
        try:
            return from_stored((record or self.record()).config)
        except ConfigError as error:
            raise CheckpointError(
                f"{self.path / RECORD}: this everseg does not understand its configuration: {error}; "
                "restore it or start again under another name"
            ) from None

    @property
    def threads(self) -> int:
        """CPU threads the run was started with."""
        return self.record().threads

    def open(self, config: RunConfig, threads: int) -> int:
        """Create the folder's run.json, or check that an existing one belongs to the same experiment.

        Returns:
            The number of CPU threads the run uses.

        Raises:
            ConfigError: the folder holds a run with other settings.
        """
        document = self.path / RECORD
        if document.exists():
            changed = difference(self.config(), config)
            if changed:
                listing = "\n  ".join(changed)
                raise ConfigError(
                    f"{self.path} holds a run with other settings:\n  {listing}\n"
                    f"Give this run another name (name=...), or delete {self.path} to start again."
                )
            return self.threads
        self.path.mkdir(parents=True, exist_ok=True)
        packages = ("everseg", "torch", "numpy", "pillow", "accelerate", "safetensors")
        write_json(
            document,
            {
                "config": to_json(config),
                "hash": config_hash(config),
                "seed": config.seed,
                "threads": threads,
                "argv": command.given(),
                "host": socket.gethostname(),
                "machine": platform.platform(),
                "cores": os.cpu_count(),
                "versions": {
                    "python": platform.python_version(),
                    **{name: version(name) for name in packages},
                },
            },
        )
        return threads

    def clean(self) -> None:
        """Delete half-written files, a minute old, of a killed process of this run; the caller holds its lock."""
        with writing(self.path):
            for folder in (self.path, *self.path.glob("steps/[0-9]*")):
                remove_leftovers(folder)

    def save_final(
        self,
        step: Step,
        model: SegmentationModel,
        method_state: dict[str, torch.Tensor],
        form: InputForm,
        parent: str | None,
    ) -> None:
        """Commit a finished step: weights, method state, and what is needed to use and continue them."""
        about = ModelFile(
            model.describe(),
            step.spaces,
            {source.domain: source.branch for source in step.test if source.domain},
            form,
            step.fresh,
        )
        save_model(self.final(step.index), about, model.state_dict(), method_state, parent=parent)

    def load_final(
        self, index: int, builder: Any = None
    ) -> tuple[SegmentationModel, dict[str, LabelSpace], dict[str, torch.Tensor], str]:
        """Read a finished step back, after verifying every byte and its link to the step before.

        Args:
            builder: the user's own architecture, if it is not a built-in one.

        Returns:
            Model in eval mode on the CPU, label space per branch, method state, digest of the folder.

        Raises:
            CheckpointError: missing, damaged, or not the child of the step before it.
        """
        folder = self.final(index)
        again = f"delete {self.step(index)} and later steps, then run the same command to do them again"
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} does not exist: step {index} is not finished; run its command to finish it"
            )
        try:
            digest = verify(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {again}") from None
        before = self.final(index - 1) if index else None
        continues = before is not None and before.is_dir() and not self.is_fresh(index)
        if before is not None and continues and parent_of(folder) != verify(before):
            raise CheckpointError(
                f"{folder} does not continue {before}: they come from different runs; {again}"
            )
        model, about = load_model(folder, builder)
        return model, dict(about.spaces), load_tensors(folder / "method_state.safetensors"), digest

    def save_result(
        self,
        index: int,
        counts: dict[str, np.ndarray],
        metrics: dict[str, Any],
        images: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Write a step's confusion counts, in all and per image, and scores (last: they mark the step as scored)."""
        for stem, arrays, kind in (("images", images or {}, np.uint32), ("confusion", counts, np.int64)):
            if arrays:
                buffer = io.BytesIO()
                given: dict[str, Any] = {name: value.astype(kind) for name, value in arrays.items()}
                np.savez_compressed(buffer, **given)
                write_bytes(self.step(index) / f"{stem}.npz", buffer.getvalue())
        write_json(self.step(index) / "metrics.json", {**metrics, "sha256": _json_hash(metrics)})

    def metrics(self, index: int) -> dict[str, Any]:
        """Scores of a scored step as `save_result` wrote them.

        Raises:
            CheckpointError: missing, or changed since.
        """
        path = self.step(index) / "metrics.json"
        stored = read_document(path, "branches")
        given = stored.pop("sha256", None)
        if given is not None and given != _json_hash(stored):
            raise CheckpointError(
                f"{path} is damaged: it does not match its own checksum; "
                "delete it and run the same command to score the step again"
            )
        scores = stored["branches"]
        if not isinstance(scores, dict) or not all(isinstance(each, dict) for each in scores.values()):
            raise CheckpointError(
                f"{path} is damaged: its branches are no scores by name; "
                "delete it and run the same command to score the step again"
            )
        return stored

    def counts(self, index: int) -> dict[str, np.ndarray]:
        """Confusion counts of a scored step, per branch: (C, C) int64, rows = truth.

        Raises:
            CheckpointError: missing or damaged.
        """
        return self._arrays(index, "confusion")

    def images(self, index: int, counts: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Of each test image of a scored step, per branch: (N, 3, C) as `evaluate` gives it; {} in older runs.

        Args:
            counts: what `counts` gave, if it was read before.

        Raises:
            CheckpointError: damaged, or not the images that `counts` counted.
        """
        if not (self.step(index) / "images.npz").exists():
            return {}
        found = self._arrays(index, "images")
        counts = self.counts(index) if counts is None else counts
        for name, each in found.items():
            if name not in counts or not np.array_equal(each.sum(0, dtype=np.int64), sums_of(counts[name])):
                raise CheckpointError(
                    f"{self.step(index) / 'images.npz'} does not fit confusion.npz beside it; "
                    "delete metrics.json there and run the same command to score the step again"
                )
        return found

    def _arrays(self, index: int, stem: str) -> dict[str, np.ndarray]:
        path = self.step(index) / f"{stem}.npz"
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except Exception as error:  # a damaged archive makes its readers raise nearly anything
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}); delete {path.with_name('metrics.json')} "
                "and run the same command to score the step again"
            ) from None


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()
