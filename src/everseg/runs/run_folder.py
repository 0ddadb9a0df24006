"""The run folder: where its files are, and how a finished step is written and read back."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from everseg.config.fields import RunConfig
from everseg.config.loading import config_hash, difference, from_stored, to_json
from everseg.data.writing import remove_leftovers
from everseg.errors import CheckpointError, ConfigError, some
from everseg.files import MB, UnreadableError, arrays_of, read_regular, whole_number
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
    write_document,
    writing,
)
from everseg.runs.documents import METRICS, RUN, SCENARIO
from everseg.runs.input_form import InputForm
from everseg.runs.memory import FILE as MEMORY
from everseg.runs.memory import Memory
from everseg.runs.model_folder import ModelFile, load_model, read_model_file, save_model
from everseg.runs.place import RECORD, what_is
from everseg.runs.versions import versions
from everseg.scenarios.steps import Step

SCENARIO_FILE = "scenario.json"
MOST_SCENARIO = 256 * MB
"""Bytes of a scenario.json: it holds a table of up to 65,536 ids for every source of every step."""
MOST_ARCHIVE = 2048 * MB
Files = Mapping[str, str] | None | Literal["read again"]
READ_AGAIN: Literal["read again"] = "read again"
AGAIN = "delete metrics.json there and run the same command to score the step again"


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json: the settings and the command of a run, and the machine it was begun on."""

    config: Any
    """The configuration as it was written. It is not checked here; `RunFolder.config` checks it."""
    threads: int
    """Number of CPU threads."""
    hash: str = ""
    """SHA-256 of the settings that decide the result."""
    argv: tuple[str, ...] = ()
    """The words of the command; () if the run was started from Python."""
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
        return sorted(number for name in names if (number := whole_number(name)) is not None)

    def is_finished(self, config: RunConfig) -> bool:
        """Tell whether the folder holds the run of this configuration with every step trained and scored."""
        if not (self.path / SCENARIO_FILE).is_file() or difference(self.config(), config):
            return False
        return len(self.finished_steps) == len(self.scenario()["steps"])

    def scenario(self) -> dict[str, Any]:
        """Read and check scenario.json.

        Raises:
            CheckpointError: the file is missing, damaged or changed.
        """
        return read_document(self.path / SCENARIO_FILE, shape=SCENARIO, most=MOST_SCENARIO)

    def chosen_step(self, step: int | None) -> int:
        """Return the step that a user asked for; by default the last finished one.

        Raises:
            CheckpointError: no step is finished.
            ConfigError: the step that the user asked for is not finished.
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
        """Read the label space of each branch after a step.

        Raises:
            CheckpointError: the file is damaged.
        """
        return dict(self.about(index).spaces)

    def branch_of(self, index: int) -> dict[str, str]:
        """Read which branch produced the results of each name (domain, or branch in runs on one data set)."""
        return {name: scores.get("branch", name) for name, scores in self.metrics(index)["branches"].items()}

    def is_fresh(self, index: int) -> bool:
        """Tell whether a finished step was trained from scratch.

        Raises:
            CheckpointError: the file is damaged.
        """
        return self.about(index).fresh

    def about(self, index: int) -> ModelFile:
        """Read the file that describes the model of a finished step.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_model_file(self.final(index))

    @property
    def is_begun(self) -> bool:
        """Whether a run was ever begun here, which means that run.json exists."""
        return (self.path / RECORD).is_file()

    def record(self) -> RunRecord:
        """Read and check run.json.

        Raises:
            CheckpointError: the folder is not a run folder, or its run.json is damaged.
        """
        path = self.path / RECORD
        if not path.is_file():
            raise CheckpointError(
                f"{self.path} {what_is(self.path)}; this needs a run folder, the one that holds {RECORD} (runs/NAME)"
            )
        stored = read_document(path, shape=RUN)
        threads, versions, argv = stored["threads"], stored.get("versions") or {}, stored.get("argv") or []
        texts = {key: stored.get(key) or "" for key in ("hash", "machine")}
        return RunRecord(stored["config"], threads, argv=tuple(argv), versions=versions, **texts)

    def config(self, record: RunRecord | None = None) -> RunConfig:
        """Read the configuration that the run was started with. Code that it names is not imported.

        Args:
            record: the result of `record`, if the caller has read it before.

        Raises:
            CheckpointError: the folder is not a run folder, or its run.json is damaged or of another everseg version.
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
        """Number of CPU threads that the run was started with."""
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
                    f"Give this run another name (name=...), or move {self.path} away to start again."
                )
            return self.threads
        self.path.mkdir(parents=True, exist_ok=True)
        packages = ("everseg", "torch", "numpy", "pillow", "accelerate", "safetensors")
        write_document(
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
                "versions": {"python": platform.python_version(), **versions(*packages)},
            },
        )
        return threads

    def clean(self) -> None:
        """Delete half-written files that a killed process of this run left at least a minute ago.

        The caller must hold the lock of the run.
        """
        for folder in (self.path, *self.path.glob("steps/[0-9]*")):
            with writing(folder):
                remove_leftovers(folder)

    def save_final(
        self,
        step: Step,
        model: SegmentationModel,
        method_state: dict[str, torch.Tensor],
        form: InputForm,
        parent: str | None,
        raw: dict[str, torch.Tensor] | None = None,
        *,
        memory: Memory | None = None,
        copies: Mapping[str, Callable[[], bytes]] | None = None,
    ) -> None:
        """Commit a finished step: weights, method state, and everything needed to use and continue them.

        Args:
            raw: where the model is an average of the step's weights, those that the last update left.
            memory: the images that later steps are trained on again, if the run has a memory.
            copies: file name -> what makes the bytes of a copy of such an image.
        """
        about = ModelFile(
            model.describe(),
            step.spaces,
            {source.domain: source.branch for source in step.test if source.domain},
            form,
            step.fresh,
            readout=model.readout,
        )
        documents = {} if memory is None else {Path(MEMORY).stem: memory.document()}
        save_model(
            self.final(step.index), about, model.state_dict(), method_state, domains=model.domain_statistics, raw=raw,
            parent=parent, documents=documents, files=copies,
        )  # fmt: skip

    def load_final(
        self, index: int, builder: Any = None
    ) -> tuple[SegmentationModel, dict[str, LabelSpace], dict[str, torch.Tensor], str]:
        """Read a finished step back, after verifying every byte and the link to the step before it.

        Args:
            builder: builder of the user's architecture, if it is not a built-in one.

        Returns:
            Model in eval mode on the CPU, label space per branch, method state, digest of the folder.

        Raises:
            CheckpointError: the step is missing or damaged, or does not continue the step before it.
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
        # A step trained from scratch continues nothing, so its link is not checked.
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
        before: dict[str, np.ndarray] | None = None,
        others: dict[str, np.ndarray] | None = None,
        boundary: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Write a step's confusion counts (total and per image), then its scores, which mark the step as scored.

        The file of the scores holds the checksums of the counts.

        Args:
            before: counts of the deployed model on the same images, if the run extends one.
            others: see `others`.
            boundary: see `boundary`.
        """
        files = {}
        for stem, arrays, kind in (
            ("before", before or {}, np.int64),
            ("others", others or {}, np.uint32),
            ("images", images or {}, np.uint32),
            ("boundary", boundary or {}, np.uint32),
            ("confusion", counts, np.int64),
        ):
            if arrays:
                buffer = io.BytesIO()
                given: dict[str, Any] = {name: value.astype(kind) for name, value in arrays.items()}
                np.savez_compressed(buffer, **given)
                files[f"{stem}.npz"] = hashlib.sha256(buffer.getvalue()).hexdigest()
                write_bytes(self.step(index) / f"{stem}.npz", buffer.getvalue())
        write_document(self.step(index) / "metrics.json", {**metrics, "files": files})

    def metrics(self, index: int) -> dict[str, Any]:
        """Read the scores of a step as `save_result` got them.

        Raises:
            CheckpointError: the file is missing, damaged or changed.
        """
        return self.scored(index)[0]

    def scored(self, index: int) -> tuple[dict[str, Any], dict[str, str] | None]:
        """Read the scores of a step, and the SHA-256 of the files of its counts; None in runs of 0.1.0.

        Raises:
            CheckpointError: the file is missing, damaged or changed.
        """
        stored = read_document(
            self.step(index) / "metrics.json",
            shape=METRICS,
            root=self.path,
            advice="delete it and run the same command to score the step again",
        )
        return stored, stored.pop("files", None)

    def counts(self, index: int, files: Files = READ_AGAIN) -> dict[str, np.ndarray]:
        """Read the confusion counts of a scored step by name of the results: (C, C) int64, rows = truth.

        Args:
            files: the second result of `scored`, if the caller has read it before.

        Raises:
            CheckpointError: the file is missing, damaged or changed.
        """
        found = self._arrays(index, "confusion.npz", np.int64, self._listed(index, files))
        for name, each in found.items():
            if each.ndim != 2 or each.shape[0] != each.shape[1] or each.min(initial=0) < 0:
                raise self._unfit(
                    index, f"confusion.npz is damaged: '{name}' is not a square table of counts"
                )
        return found

    def images(
        self, index: int, counts: Mapping[str, np.ndarray] | None = None, files: Files = READ_AGAIN
    ) -> dict[str, np.ndarray]:
        """Read the counts per test image of a scored step by name of the results, (N, 3, C); {} in older runs.

        They are, for each image and class: the true pixels, the predicted pixels, and the pixels that are both.

        Args:
            counts: the result of `counts`, if the caller has read it before.
            files: as for `counts`.

        Raises:
            CheckpointError: the file is damaged or changed, or its images do not add up to `counts`.
        """
        return self._per_image(
            index, "images.npz", counts, files,
            lambda each, count: np.array_equal(each.sum(0, dtype=np.int64), sums_of(count)),
        )  # fmt: skip

    def before(self, index: int, files: Files = READ_AGAIN) -> dict[str, np.ndarray]:
        """Read the counts of the deployed model on the test images of the step that extends it, (C, C), rows = truth.

        They are {} in other runs, in runs of older versions, and for a branch that the deployed model does not have.

        Args:
            files: as for `counts`.

        Raises:
            CheckpointError: the file is damaged or changed.
        """
        return self._further(index, "before.npz", np.int64, files)

    def others(self, index: int, files: Files = READ_AGAIN) -> dict[str, np.ndarray]:
        """Read the counts per test image with everything that no class of the model is as a further, last class.

        Only extensions of models without background have them, (N, 3, C + 1) as in `images`: such a model has no class
        for the other pixels, which would be ignored, and with them whatever it calls so wrongly there.

        Args:
            files: as for `counts`.

        Raises:
            CheckpointError: the file is damaged or changed.
        """
        return self._further(index, "others.npz", np.uint32, files)

    def boundary(
        self, index: int, counts: Mapping[str, np.ndarray] | None = None, files: Files = READ_AGAIN
    ) -> dict[str, np.ndarray]:
        """Read the boundary counts per test image, (N, 3, C) as `metrics.boundary_sums`; {} where none were asked for.

        Args:
            counts: the result of `counts`, if the caller has read it before.
            files: as for `counts`.

        Raises:
            CheckpointError: the file is damaged or changed, or has other results or classes than `counts`.
        """
        return self._per_image(
            index, "boundary.npz", counts, files, lambda each, count: each.shape[2] == len(count)
        )

    def _per_image(
        self,
        index: int,
        file: str,
        counts: Mapping[str, np.ndarray] | None,
        files: Files,
        fits: Callable[[np.ndarray, np.ndarray], bool],
    ) -> dict[str, np.ndarray]:
        """Read counts per image, (N, 3, C), of an archive that may be absent.

        Args:
            fits: whether one table agrees with the confusion counts of its name.
        """
        listed = self._listed(index, files)
        found = self._further(index, file, np.uint32, listed)
        if not found:
            return found
        counts = self.counts(index, listed) if counts is None else counts
        for name, each in found.items():
            if each.ndim != 3 or each.shape[1] != 3:
                raise self._unfit(index, f"{file} is damaged: '{name}' is not a table of counts per image")
            if name not in counts or not fits(each, counts[name]):
                raise self._unfit(index, f"{file} does not fit confusion.npz beside it")
        return found

    def _further(self, index: int, name: str, kind: type[np.integer], files: Files) -> dict[str, np.ndarray]:
        listed = self._listed(index, files)
        there = (self.step(index) / name).exists() if listed is None else name in listed
        return self._arrays(index, name, kind, listed) if there else {}

    def save_kept(self, index: int, kept: Mapping[str, Any]) -> None:
        """Write what an extension kept of the old classes, and what its gate said."""
        write_document(self.step(index) / "kept.json", kept)

    def kept(self, index: int) -> dict[str, Any]:
        """Read what `save_kept` wrote; {} where the run is no extension, or was never compared with its bundle.

        Raises:
            CheckpointError: the file is damaged or changed.
        """
        path = self.step(index) / "kept.json"
        return read_document(path, "how", "text", root=self.path) if path.exists() else {}

    def _listed(self, index: int, files: Files) -> Mapping[str, str] | None:
        return self.scored(index)[1] if isinstance(files, str) else files

    def _arrays(
        self, index: int, name: str, kind: type[np.integer], listed: Mapping[str, str] | None
    ) -> dict[str, np.ndarray]:
        """Read an archive of counts and compare it with its checksum, which runs of 0.1.0 do not have."""
        try:
            data = read_regular(self.step(index) / name, MOST_ARCHIVE, root=self.path)
            if listed is not None and hashlib.sha256(data).hexdigest() != listed.get(name):
                raise self._unfit(index, f"{name} is damaged: its SHA-256 is not the one in metrics.json")
            found = arrays_of(data)
        except UnreadableError as error:
            raise self._unfit(index, f"{name} cannot be read ({error})") from None
        if wrong := [array for array, each in found.items() if each.dtype != kind]:
            raise self._unfit(index, f"{name} is damaged: {some(wrong, 4)} should be {kind.__name__}")
        return found

    def _unfit(self, index: int, what: str) -> CheckpointError:
        return CheckpointError(f"{self.step(index)}/{what}; {AGAIN}")
