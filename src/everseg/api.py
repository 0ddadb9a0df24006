"""The Python API: the functions that the command line calls and that `everseg.X` offers.

A function that needs one subpackage only is defined there and imported here. Functions that combine several
subpackages are defined here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast, overload

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from everseg.config.fields import RunConfig
from everseg.config.loading import load as load_config
from everseg.config.loading import to_json
from everseg.deploy.adopt import adopt
from everseg.deploy.bench import bench
from everseg.deploy.browser import page
from everseg.deploy.bundle import Bundle
from everseg.deploy.diff import diff
from everseg.deploy.export import export
from everseg.deploy.extend import Extension, extend, preview
from everseg.deploy.history import history, rollback
from everseg.deploy.hub import pull, push
from everseg.deploy.reclass import ClassChanges
from everseg.deploy.serve import serve
from everseg.deploy.sign import sign, verify
from everseg.display import OnceADictionary, Piece, Result, in_percent, printable
from everseg.engine.rescore import Scores, evaluate, stored_config
from everseg.engine.run import execute
from everseg.engine.runtime import keeping_threads
from everseg.engine.sharing import share_first_step
from everseg.errors import CheckpointError, EversegError
from everseg.inference import predict as inference
from everseg.inference.predict import LoadedModel, Prediction, predict
from everseg.interop.convert import export_mdil, export_mdil_encoder, export_mib, import_mdil, import_mib
from everseg.labels import BACKGROUND
from everseg.progress import Progress
from everseg.reports import terminal
from everseg.reports.baselines import domain_rows, drop_against_single
from everseg.reports.compare.comparison import compare
from everseg.reports.feature_shift import FeatureDrift, write_features
from everseg.reports.html import IMAGES, ReportFile, report_at_the_end, write_report
from everseg.reports.installation import env
from everseg.reports.outline import show
from everseg.reports.run_scores import RunStep, RunTable, SequenceScores
from everseg.runs.results import Results, StepResults
from everseg.runs.run_folder import RunFolder
from everseg.sweeps.sweep import sweep

__all__ = [
    "Demo", "DemoRow", "LoadedModel", "Model", "Prediction", "Run", "adopt", "bench", "compare", "demo", "diff", "env",
    "evaluate", "export", "export_mdil", "export_mdil_encoder", "export_mib", "extend", "features", "history",
    "import_mdil", "import_mib", "load", "page", "predict", "preview", "pull", "push", "report", "rollback", "run",
    "serve", "show", "sign", "sweep", "verify",
]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Run(Result):
    """A run on disk. Every number is computed from the counts that its steps stored."""

    folder: RunFolder
    asked: RunConfig | None = None
    """Configuration that the caller gave, if known. Its single-task numbers may differ from those stored in the run."""

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @cached_property
    def results(self) -> Results:
        """What the run has stored. Each file is read once, when it is first needed."""
        return Results(self.folder)

    @property
    def config(self) -> RunConfig:
        return self.results.config

    @property
    def notes(self) -> tuple[str, ...]:
        """How the run treated class names that were not as expected, for example classes that no step teaches."""
        return self.results.notes

    @cached_property
    def steps(self) -> tuple[RunStep, ...]:
        """Scores of each finished step; over domains one entry per step and domain."""
        return tuple(row for step in self.results.steps for row in self._rows(step))

    def _rows(self, step: StepResults) -> list[RunStep]:
        taught = "classes" if self.config.scenario.joint else "new_classes"
        try:
            return [
                RunStep(
                    **{field.name: getattr(scores, field.name) for field in fields(scores)},
                    index=step.index,
                    name=name,
                    classes=tuple(label for label in step.scores[name][taught] if label != BACKGROUND),
                )
                for name in self.results.in_order(step.scores)
                for scores in [Scores.of({"branch": name, **step.scores[name]})]
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder.step(step.index) / 'metrics.json'} is damaged ({error!r}); "
                "delete it and run the same command to score the step again"
            ) from None

    def table(self) -> RunTable:
        """One row per step: index, new classes, and mIoU in percent, with and without background.

        Over domains: index, domains trained, and the mIoU of every domain tested, in percent.
        """
        labels = f"label policy {self.results.policy}"
        if self.over_domains:
            scores: dict[int, dict[str, float | None]] = {}
            for step in self.steps:
                scores.setdefault(step.index, {})[step.name] = step.miou["all"]
            title = f"{self.config.name}: mIoU in percent of each domain after each step, {labels}"
            return RunTable.of(domain_rows(scores, self.results), title)
        rows = []
        for step in self.steps:
            row: dict[str, Any] = {"step": step.index, "new classes": ", ".join(step.classes)}
            for suffix, miou in (("", step.miou), (" (no background)", step.miou_without_background)):
                for group in ("old", "new", "base", "all"):
                    row[group + suffix] = in_percent(miou[group])
            rows.append(row)
        return RunTable.of(rows, f"{self.config.name}: mIoU in percent after each step, {labels}")

    @property
    def over_domains(self) -> bool:
        """Whether the run is over domains. If so, results are per domain."""
        return bool(self.config.data.domains)

    @property
    def taught(self) -> dict[int, str]:
        """Step -> the domains (or the data set) whose images it trained on."""
        return self.results.taught

    @cached_property
    def sequence(self) -> SequenceScores:
        """Average over steps, forgetting and backward transfer; over domains also the relative drop, if known.

        Raises:
            CheckpointError: no step is finished yet.
        """
        self.folder.chosen_step(None)
        sequence = dict(self.results.sequence)
        if self.over_domains:
            sequence["relative_drop"] = drop_against_single(self.results, self.asked or self.config)
        return SequenceScores.of(sequence)

    def shown(self) -> Iterator[Piece]:
        result = self.to_json()
        yield terminal.run_table(result)
        texts = (terminal.sequence_text(result), terminal.reporting_text(result), terminal.drop_text(result))
        yield from (text for text in texts if text)

    def __repr__(self) -> str:
        try:
            return str(self)
        except (EversegError, OSError):  # nothing is scored yet, or the folder has gone
            return f"Run({str(self.path)!r})"

    def export(self, out: str | Path | None = None, **options: Any) -> Bundle:
        """Write a finished step as a bundle; see `everseg.deploy.export.export`."""
        return export(self.path, out, **options)

    def to_json(self) -> dict[str, Any]:
        """Convert the run to a JSON value for scripts: configuration, scores per step and over the sequence."""
        return {
            "name": self.config.name,
            "path": str(self.path),
            "config": to_json(self.config),
            "steps": [step.to_json() for step in self.steps],
            **({"table": self.table().to_json()} if self.over_domains else {}),
            **({"plop_rule": figures} if (figures := self.steps and self.results.plop_figures) else {}),
            **(self.sequence.to_json() if self.steps else {}),
            **(
                {"memory": [asdict(kept) for kept in memories]} if (memories := self.results.memories) else {}
            ),
            "notes": list(self.notes),
        }

    def report(self, out: str | Path | None = None, *, images: int = IMAGES) -> Path:
        """Write the run's report (one HTML file, by default in the run's folder) and return its path."""
        target = None if out is None else Path(out)
        config = self.asked or stored_config(self.folder, stored=self.config)
        return write_report(self.results, config, out=target, images=images).path


@keeping_threads()
def run(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    quiet: bool = False,
    **sections: Any,
) -> Run:
    """Run a preset, a YAML file or a mapping, continuing an unfinished run of the same name.

    Args:
        source: preset name, path of a YAML file, or a mapping.
        overrides: "key=value" strings, as on the command line.
        dry_run: take two iterations of every step through every stage in a temporary folder.
        quiet: print no progress.
        sections: further settings as keywords, for instance `data={"root": ...}`, `method="mib"`, `seed=1`.

    Raises:
        EversegError: with what, where and what to do.
    """
    config = load_config(source, overrides, **sections)
    if not dry_run:
        done = Run(execute(config, quiet=quiet), config)
        if config.report:
            _report_at_the_end(done, quiet)
        return done
    processes = PartialState(cpu=not torch.cuda.is_available())
    with contextlib.ExitStack() as held:
        out = [""]
        if processes.is_main_process:
            out = [held.enter_context(tempfile.TemporaryDirectory(prefix="everseg-dry-run-"))]
        broadcast_object_list(out)
        few = {"max_iterations": 2, "log_every": 1, "checkpoint_every": 1}
        small = config.model_copy(update={"out": out[0], "train": config.train.model_copy(update=few)})
        done = Run(execute(small, quiet=quiet, dry_run=True))
        _ = (
            done.steps,
            done.sequence,
            done.config,
            done.taught,
        )  # read them before the temporary folder is deleted
        processes.wait_for_everyone()
        return done


def _report_at_the_end(done: Run, quiet: bool) -> None:
    """Write the report of a run that has just finished, in the first process."""
    rank = PartialState().process_index
    report_at_the_end(done.results, done.asked or done.config, quiet=quiet, rank=rank)


def report(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    images: int = IMAGES,
    quiet: bool = False,
) -> ReportFile:
    """Write the report of a run with at least one finished step.

    Args:
        path: run folder.
        overrides: `data...` settings that say where the data are now.
        out: file to write; default RUN/report.html.
        images: number of test images from which the pictures are chosen; 0 = no pictures.
        quiet: print no progress.

    Raises:
        EversegError: with what, where and what to do.
    """
    results = Results(RunFolder(Path(path)))
    config = stored_config(results.folder, overrides, stored=results.config)
    target = None if out is None else Path(out)
    return write_report(results, config, out=target, images=images, progress=Progress(quiet=quiet))


def features(
    path: str | Path,
    *,
    before: int | None = None,
    after: int | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    pixels: int = 200,
    images: int = 200,
    seed: int = 0,
    quiet: bool = False,
) -> FeatureDrift:
    """Compare the encoder's features of the same pixels before and after steps. Write tables and PNGs to a folder.

    Args:
        path: run folder.
        before: earlier finished step; default the one before `after`.
        after: later finished step; default the last one.
        overrides: `data...` settings that say where the data are now.
        out: folder for the files; default RUN/features/before-K-after-L.
        pixels: maximum number of pixels per class and domain.
        images: maximum number of test images per domain, drawn with the seed.
        seed: seed of the draws and of t-SNE.
        quiet: print no progress.

    Raises:
        EversegError: with what, where and what to do.
    """
    folder = RunFolder(Path(path))
    config = stored_config(folder, overrides)
    return write_features(
        folder,
        config,
        before=before,
        after=after,
        out=None if out is None else Path(out),
        limit=pixels,
        images=images,
        seed=seed,
        progress=Progress(quiet=quiet),
    )


class Model(LoadedModel):
    """A trained model with its class names. It predicts, and a model loaded from a bundle can learn more classes."""

    def __repr__(self) -> str:
        """Show the model's classes, for each branch if there are several."""
        where = "" if self.path is None else f" of {self.path}"
        each = [f"{name}: {', '.join(space.names)}" for name, space in self.spaces.items()]
        if len(each) == 1:
            each = [", ".join(self.classes)]
        return printable("\n  ".join([f"Model{where} that knows", *each]))

    def extend(
        self, *, data: str | Path | None = None, add: Sequence[str] = (), **options: Any
    ) -> Extension | ClassChanges:
        """Teach the model more classes, images or places, or change its classes; see `everseg.deploy.extend.extend`.

        Raises:
            CheckpointError: the model was not loaded from a bundle.
        """
        if self.path is None:
            raise CheckpointError(
                "this model was not loaded from a bundle: use everseg.load(BUNDLE).extend(...)"
            )
        return extend(self.path, data=data, add=add, **options)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    builder: Any = None,
    precision: str | None = None,
    require_signature: str | Path | None = None,
) -> Model:
    """Load a trained model: from a run folder (its last step), from a finished step's folder, or from a bundle.

    Args:
        step: which step of a run; default the last.
        builder: builder of your own architecture, if the model is not a built-in one. everseg never imports it by
            itself.
        precision: predict with a bundle's ONNX file of this precision ("fp32", "fp16", "int8"); None = with PyTorch.

        require_signature: file of the public key that must have signed the bundle (`everseg sign`).

    Raises:
        CheckpointError: the folder is missing or damaged, holds no everseg model, or is not signed with the key.
        ConfigError: there is no ONNX file of that precision.
    """
    loaded = inference.load(
        path, step=step, builder=builder, precision=precision, require_signature=require_signature, kind=Model
    )
    return cast(Model, loaded)


DEMO_METHODS = ("ft", "mib", "joint")


@dataclass(frozen=True)
class DemoRow(OnceADictionary):
    """Scores of one method in the demo, as fractions."""

    method: str
    path: Path
    """Run folder."""
    first: float | None
    """mIoU of all classes after step 0; None for joint training, which has one step."""
    base: float | None
    """mIoU of the classes of step 0 after the last step."""
    old: float | None
    """The same as `base`, because the task has two steps."""
    new: float | None
    """mIoU of the classes that the last step added."""
    all: float | None
    """mIoU of all classes after the last step."""
    forgetting: float | None
    """mIoU that the classes of step 0 have lost; None for joint training."""

    def shown(self) -> Iterator[Piece]:
        yield terminal.demo_table([self.to_json()])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, repr=False)
class Demo(Result, Sequence[DemoRow]):
    """Fine-tuning, MiB and joint training side by side, one row per method."""

    rows: tuple[DemoRow, ...]

    @overload
    def __getitem__(self, at: int) -> DemoRow: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[DemoRow, ...]: ...
    def __getitem__(self, at: int | slice) -> DemoRow | tuple[DemoRow, ...]:
        return self.rows[at]

    def __len__(self) -> int:
        return len(self.rows)

    def shown(self) -> Iterator[Piece]:
        yield "Generated street scenes: step 0 teaches 4 classes, step 1 adds 2 without labels of the old ones.\n"
        yield terminal.demo_table([row.to_json() for row in self.rows])
        yield from (f"  {row.method:<6} {row.path}" for row in self.rows)

    def to_json(self) -> list[dict[str, Any]]:
        return [row.to_json() for row in self.rows]


@keeping_threads()
def demo(
    *,
    out: str | Path = "runs",
    seed: int = 0,
    quiet: bool = False,
    shown: Callable[[Demo], None] | None = None,
) -> Demo:
    """Run fine-tuning, MiB and joint training on generated scenes, as three runs in `out`.

    Fine-tuning and MiB train exactly the same first step, so MiB's run starts from a copy of fine-tuning's.

    Args:
        out: folder for the runs.
        seed: seed of initial weights, order and augmentation.
        quiet: print no progress.
        shown: function to call with the result as soon as every run is scored, before the reports are written.
    """
    runs = []
    progress = Progress(quiet=quiet)
    for method in DEMO_METHODS:
        progress.message(f"{method}:")
        if method == "mib":
            share_first_step(RunFolder(Path(out) / "demo-ft"), RunFolder(Path(out) / "demo-mib"))
        config = load_config(f"demo-{method}", out=str(out), seed=seed)
        runs.append(Run(execute(config, quiet=quiet), config))
    result = Demo(tuple(_demo_row(method, done) for method, done in zip(DEMO_METHODS, runs, strict=True)))
    if shown is not None:
        shown(result)
    for (
        done
    ) in runs:  # reports come last, so that those of fine-tuning and MiB include the row of joint training
        _report_at_the_end(done, quiet)
    return result


def _demo_row(method: str, done: Run) -> DemoRow:
    last = done.steps[-1]
    joint = len(done.steps) == 1
    first = None if joint else done.steps[0].miou["all"]
    lost = None if joint else done.sequence.forgetting.mean
    return DemoRow(method, done.path, first, **last.miou, forgetting=lost)
