"""What the command line calls, and the same words in Python (floor 6)."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from everseg import registry
from everseg.config import RunConfig
from everseg.config_loading import identity, to_json
from everseg.config_loading import load as load_config
from everseg.data.base import Dataset
from everseg.data.datasets import load_dataset
from everseg.data.index import class_counts
from everseg.engine.checkpoint import writing
from everseg.engine.folder import RunFolder
from everseg.engine.progress import Progress
from everseg.engine.run import execute, prepare, score_step
from everseg.engine.runtime import make_accelerator
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.interop.convert import export_mib, import_mib
from everseg.labels import LabelSpace, policy_set
from everseg.predictor import LoadedModel, Prediction, load, predict
from everseg.report.feature_report import compare
from everseg.scenarios.steps import Source
from everseg.scenarios.summary import summarise

__all__ = [
    "LoadedModel", "Prediction", "Run", "demo", "describe_scenario", "evaluate", "export_mib", "features", "import_mib",
    "load", "predict", "run",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run on disk: every number derives from the counts its steps stored."""

    folder: RunFolder

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @cached_property
    def config(self) -> RunConfig:
        return self.folder.config()

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Scores of each finished step (fractions in [0, 1], None where undefined)."""
        return [row for index in self.folder.finished_steps for row in self._rows(index)]

    def _rows(self, index: int) -> list[dict[str, Any]]:
        branches = self.folder.metrics(index)["branches"]
        taught = "classes" if self.config.scenario.joint else "new_classes"
        try:
            return [
                {
                    "index": index,
                    "branch": branch,
                    "classes": [name for name in scores[taught] if name != "background"],
                    **{k: v for k, v in scores.items() if k not in ("classes", "new_classes")},
                    "class_iou": dict(zip(scores["classes"], scores["class_iou"], strict=True)),
                    "class_accuracy": dict(zip(scores["classes"], scores["class_accuracy"], strict=True)),
                }
                for branch, scores in branches.items()
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder.step(index) / 'metrics.json'} is damaged ({error!r}); "
                "delete it and run the same command to score the step again"
            ) from None

    def table(self) -> list[dict[str, Any]]:
        """One row per step: index, new classes, and mIoU in percent, with and without background."""
        rows = []
        for step in self.steps:
            row: dict[str, Any] = {"step": step["index"], "new classes": ", ".join(step["classes"])}
            for suffix, key in (("", "miou"), (" (no background)", "miou_without_background")):
                for group in ("old", "new", "base", "all"):
                    value = step[key][group]
                    row[group + suffix] = None if value is None else round(100 * value, 2)
            rows.append(row)
        return rows

    @cached_property
    def sequence(self) -> dict[str, Any]:
        """Average over steps, forgetting and backward transfer."""
        return self.folder.sequence_scores()

    def to_json(self) -> dict[str, Any]:
        """Everything for scripts: configuration, scores per step and over the sequence."""
        return {
            "name": self.config.name,
            "path": str(self.path),
            "config": to_json(self.config),
            "steps": self.steps,
            **self.sequence,
        }


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
        return Run(execute(config, quiet=quiet))
    processes = PartialState(cpu=not torch.cuda.is_available())
    with contextlib.ExitStack() as held:
        out = [""]
        if processes.is_main_process:
            out = [held.enter_context(tempfile.TemporaryDirectory(prefix="everseg-dry-run-"))]
        broadcast_object_list(out)
        few = {"max_iterations": 2, "log_every": 1, "checkpoint_every": 1}
        small = config.model_copy(update={"out": out[0], "train": config.train.model_copy(update=few)})
        done = Run(execute(small, quiet=quiet, dry_run=True))
        _ = done.steps, done.sequence, done.config  # read while the folder is there
        processes.wait_for_everyone()
        return done


def evaluate(
    path: str | Path, *, step: int | None = None, overrides: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Score a finished step again, on the run's own test images or on others.

    Args:
        path: run folder.
        step: which step; default the last finished one.
        overrides: other images or another way to look at them: `data...`, `scenario.test_split`,
            `scenario.policy`, `train.eval_batch`, `train.precision`, `train.threads`.

    Returns:
        {"run", "step", "branches": {branch: scores}}: on the same data exactly the numbers of the run.

    Raises:
        ConfigError: an override that cannot change a finished model's score; a user's own code not named in
            `overrides`.
    """
    folder = RunFolder(Path(path))
    stored = folder.config()
    config = load_config(to_json(stored), overrides)
    _refuse_training_settings(stored, config)
    _refuse_stored_code(config, overrides)
    index = folder.chosen_step(step)
    accelerator = make_accelerator(config, training=False)
    if config.train.threads is None:
        torch.set_num_threads(folder.threads)
    progress = Progress(quiet=quiet, rank=accelerator.process_index)
    sources: tuple[Source, ...] = ()
    spaces = folder.spaces(index)
    own_scenario = config.scenario.kind not in registry.BUILTIN["scenario"]
    if own_scenario and (stored.data.dataset, stored.scenario) == (config.data.dataset, config.scenario):
        prepared = prepare(config, progress)
        dataset, steps = prepared.dataset, prepared.steps
        if index < len(steps) and steps[index].spaces == spaces:  # the data may have other classes by now
            sources = steps[index].test
    else:
        dataset = load_dataset(config.data)
    sources = sources or _sources_by_name(dataset, config, spaces)
    result, scores = score_step(config, dataset, sources, folder, index, accelerator, progress)
    return {
        "run": str(path),
        "step": index,
        "images": sum(len(source.indices) for source in sources),
        "branches": scores,
        "confusion": {branch: counts.tolist() for branch, counts in result.counts.items()},
    }


EVALUATION_KEYS = ("data.", "scenario.test_split", "scenario.policy", "train.precision", "train.threads")


def _refuse_training_settings(stored: RunConfig, config: RunConfig) -> None:
    """A setting that could only have changed the training is refused, not ignored."""
    before, now = identity(stored), identity(config)
    changed = [key for key in now if now[key] != before.get(key) and not key.startswith(EVALUATION_KEYS)]
    if changed:
        raise ConfigError(
            [f"{key}: cannot be changed for a finished run; start another run for that" for key in changed]
        )


def _refuse_stored_code(config: RunConfig, overrides: Sequence[str]) -> None:
    """A run folder may come from somebody else: code it names is imported only if the user names it too."""
    given = {text.partition("=")[2].strip() for text in overrides}
    for kind, key, name in (
        ("model", "model", config.model.name),
        ("dataset", "data", config.data.dataset),
        ("scenario", "scenario.kind", config.scenario.kind),
    ):
        if ":" in name and name not in given and name not in registry.names(kind):
            raise ConfigError(f"this run uses your own code '{name}'; say so to let it run: {key}={name}")


def _sources_by_name(
    dataset: Dataset, config: RunConfig, spaces: Mapping[str, LabelSpace]
) -> tuple[Source, ...]:
    """Test sources made from the test split alone: classes are matched by name, others follow the label policy.

    On the run's own data this is what the scenario builder makes: images with any class known, all of them labelled.
    """
    split_name = config.scenario.test_split
    if split_name not in dataset.splits:
        raise ConfigError(
            f"data set '{dataset.name}' has no split '{split_name}'; it has {', '.join(dataset.splits)}"
        )
    policy = policy_set(config.scenario.policy).test
    counts = class_counts(dataset.splits[split_name], dataset.labels)
    sources = []
    for branch, space in spaces.items():
        table = np.full(256, policy.void, np.uint8)
        known = []
        for raw, name in dataset.labels.names.items():
            if raw == dataset.labels.background:
                table[raw] = policy.background
            elif name in space.names:
                table[raw] = space.names.index(name)
                known.append(raw)
            else:
                table[raw] = policy.future
        if not known:
            raise DataError(
                f"data set '{dataset.name}' shares no class name with the model: it has "
                f"{', '.join(dataset.labels.names.values())}; the model knows {', '.join(space.names)}"
            )
        indices = np.flatnonzero(counts[:, known].sum(1) > 0)
        sources.append(Source(branch, dataset.name, split_name, tuple(map(int, indices)), table.tobytes()))
    return tuple(sources)


def features(
    path: str | Path,
    *,
    before: int | None = None,
    after: int | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Compare the encoder's features of the same pixels before and after steps; tables and PNGs in a folder.

    Args:
        path: run folder.
        before: earlier finished step; default the one before `after`.
        after: later finished step; default the last one.
        overrides: where the data lie now, `data...`.
        options: `out`, `limit`, `images`, `seed` of `everseg.report.feature_report.compare`.

    Raises:
        EversegError: with what, where and what to do.
    """
    folder = RunFolder(Path(path))
    stored = folder.config()
    config = load_config(to_json(stored), overrides)
    _refuse_training_settings(stored, config)
    _refuse_stored_code(config, overrides)
    return compare(folder, config, before=before, after=after, progress=Progress(quiet=quiet), **options)


def describe_scenario(config: RunConfig, *, quiet: bool = False) -> list[dict[str, Any]]:
    """What every step will see before training: new classes, images, pixels per class, leaks between steps."""
    prepared = prepare(config, Progress(quiet=quiet))
    return summarise(prepared.steps, prepared.counts)


def _copy_first_step(source: RunFolder, target: RunFolder) -> None:
    """Give a run that has not begun the finished first step of another; the run itself verifies it."""
    if target.step(0).exists():
        return
    temporary = target.final(0).with_name("final.tmp")
    with writing(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source.final(0), temporary)
        temporary.rename(target.final(0))


DEMO_METHODS = ("ft", "mib", "joint")


def demo(*, out: str | Path = "runs", quiet: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Fine-tuning, MiB and joint training on generated scenes; the three runs lie in `out`.

    Fine-tuning and MiB train the first step alike, to the last bit, so MiB's run starts from a copy of it.

    Returns:
        One row per method: name, path, mIoU of step 0 (`first`), of old, new and all classes after step 1, forgetting.
    """
    rows = []
    progress = Progress(quiet=quiet)
    for method in DEMO_METHODS:
        progress.message(f"{method}:")
        if method == "mib":
            _copy_first_step(RunFolder(Path(out) / "demo-ft"), RunFolder(Path(out) / "demo-mib"))
        done = run(f"demo-{method}", out=str(out), seed=seed, quiet=quiet)
        last = done.steps[-1]
        joint = len(done.steps) == 1
        first = None if joint else done.steps[0]["miou"]["all"]
        lost = None if joint else done.sequence["forgetting"]["mean"]
        rows.append(
            {"method": method, "path": str(done.path), "first": first, **last["miou"], "forgetting": lost}
        )
    return rows
